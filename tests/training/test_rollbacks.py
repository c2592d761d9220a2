"""A rollback to a checkpoint that turns out to be damaged, and faults of storage that may pass."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from blt_titan.checkpoint.read import CheckpointError, DamagedError
from blt_titan.checkpoint.rollback import NAME
from blt_titan.training import rollbacks
from blt_titan.training.error_causes import lost_storage
from blt_titan.training.rollbacks import Rollbacks


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_that_goes_back(folder: Path, damaged: set[int], monkeypatch) -> tuple[Rollbacks, list[int], list[str]]:
    """A run with checkpoints of steps 2, 4 and 6 that is to go back to the last."""
    import numpy as np

    steps, loaded, phases = [2, 4, 6], [], []
    for step in steps:
        (folder / f"step-{step}").mkdir(parents=True)

    def load(step: int) -> None:
        if step in damaged:
            raise DamagedError(f"step-{step}/__0_0.distcp: a bit is not what was written")
        loaded.append(step)

    monkeypatch.setattr(rollbacks, "latest_before", lambda _, most: max((s for s in steps if s <= most), default=None))
    data: Any = SimpleNamespace(state_dict=lambda: {"rows_served": 40, "positions": np.zeros((3, 4), np.int64)})
    parts: dict[str, Any] = {
        "checkpointer": SimpleNamespace(load=load, load_only=True),
        "watch": SimpleNamespace(rollbacks=1),
        "heartbeat": SimpleNamespace(at=phases.append),
    }
    run = Rollbacks(2, checkpoints=folder, dataloader=data, **parts)
    run._due = 6
    return run, loaded, phases


def test_a_damaged_checkpoint_is_passed_over_by_a_rollback(tmp_path, monkeypatch):
    run, loaded, phases = run_that_goes_back(tmp_path, {4, 6}, monkeypatch)
    run.go_back()
    assert loaded == [2]
    # A resume reads where the data goes on beside the step that was loaded, and nowhere else.
    assert [path.parent.name for path in tmp_path.glob(f"*/{NAME}")] == ["step-2"]
    assert phases == ["load"], "the watch must know that files are read"


def test_where_none_is_sound_a_rollback_says_which_was_damaged(tmp_path, monkeypatch):
    run, loaded, _ = run_that_goes_back(tmp_path, {2, 4, 6}, monkeypatch)
    with pytest.raises(DamagedError, match="step-2"):
        run.go_back()
    assert not loaded
    assert not list(tmp_path.glob(f"*/{NAME}"))


@pytest.mark.parametrize(
    ("number", "may_pass"),
    [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOSPC, False), (errno.EROFS, False), (errno.EACCES, False)],
)
def test_a_mount_that_was_away_is_worth_another_try_and_a_full_disk_is_not(number, may_pass):
    error = CheckpointError("step-8: a checkpoint could not be written")
    error.__cause__ = OSError(number, "said by the kernel")
    found = lost_storage(error)
    assert (found is not None) is may_pass
    assert found is None or str(found) == str(error)
