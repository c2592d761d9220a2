"""A run that is told to leave while it waits for its last exports."""

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from blt_titan.training.preemption import PreemptedError, Preemption
from blt_titan.training.scheduled_exports import ScheduledExports
from tests.helpers.distributed import run_distributed


def wait_for_exports() -> str:
    """Wait on all ranks, of which rank 0 is told to leave."""
    exports = ScheduledExports.__new__(ScheduledExports)
    exports._group = dist.new_group(backend="gloo")
    of_rank_0: Any = SimpleNamespace(finish=lambda leaves: not leaves())
    exports._exports = of_rank_0 if dist.get_rank() == 0 else None
    preemption = Preemption()
    exports.finish(preemption)  # nobody was told: all are done
    with preemption.heard():
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(PreemptedError) as told:
            exports.finish(preemption)
    return str(told.value)


@pytest.mark.slow
def test_all_ranks_leave_and_say_that_exports_go_on():
    first, second = run_distributed(wait_for_exports, 2)
    assert first == (
        "told to leave by SIGUSR1: the run is complete, its exports are not; the same command goes on with them"
    )
    assert second == first.replace("SIGUSR1", "another rank's signal")
