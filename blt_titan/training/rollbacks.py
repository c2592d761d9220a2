"""Back before a spike of the loss, and on with other rows: PaLM's remedy (arXiv 2204.02311, section 5.1).

    steps   ... 90  100s  101  102 ... 110   101  102 ...         100 was saved, 110 spikes
    rows    ...  D   E     F    G  ...  O     P    Q  ...         F to O are not read again

Weights, optimizer and schedule are those of an earlier checkpoint; the loader stays where it is. What happened is
written beside that checkpoint (`checkpoint/rollback.py`) before anything is loaded, and applied where a checkpoint is
loaded, so that a run that is killed at any time, and resumes, does the same.
"""

from pathlib import Path

import numpy as np
import torch.distributed as dist

from blt_titan.checkpoint.find import latest_before
from blt_titan.checkpoint.read import DamagedError
from blt_titan.checkpoint.rollback import NAME as ROLLBACK_NAME
from blt_titan.checkpoint.rollback import Rollback, read_rollback
from blt_titan.checkpoint.steps import step_folder
from blt_titan.config.resume import saved_position
from blt_titan.data.rows.loader import RowLoader
from blt_titan.titan import logger
from blt_titan.training.checkpointer import RunCheckpoints
from blt_titan.training.failures import StepFigures, StepWatch
from blt_titan.training.heartbeat import Heartbeat


class Rollbacks:
    """Takes a run back, and finds where its data goes on; on each rank, and collective.

    Args:
        rollback_steps: steps that a checkpoint must be older than a spike.
        checkpoints: the folder of the run's `step-N`.
        checkpointer: loads them; what the trainer does after a load it does after these, too.
        dataloader: stays where it is.
        watch: counts.
        heartbeat: is told what takes long.
    """

    def __init__(
        self,
        rollback_steps: int,
        *,
        checkpoints: Path,
        checkpointer: RunCheckpoints,
        dataloader: RowLoader,
        watch: StepWatch,
        heartbeat: Heartbeat,
    ):
        self._rollback_steps, self._checkpoints = rollback_steps, checkpoints
        self._checkpointer, self._dataloader, self._watch = checkpointer, dataloader, watch
        self._heartbeat = heartbeat
        self._due: int | None = None

    @property
    def is_due(self) -> bool:
        """Whether the run is to go back before it makes another step; nothing is saved until then."""
        return self._due is not None

    def prepare(self, spike: StepFigures) -> None:
        """Find the checkpoint to go back to before a spike, within a step; where there is none, the run goes on.

        Raises:
            LossSpikeError: the run has gone back as often as it may.
        """
        self._watch.spike = None
        self._heartbeat.at("save")  # one that is not stored yet is waited for
        self._checkpointer._async_wait()
        found: list[tuple[int, int] | None] = [None]
        if dist.get_rank() == 0 and (before := latest_before(self._checkpoints, spike.step - self._rollback_steps)):
            found = [(before, saved_position(step_folder(self._checkpoints, before))[1])]
        dist.broadcast_object_list(found)
        if found[0] is not None:
            step, first_row = found[0]
            self._watch.go_back(spike, step, range(first_row, self._dataloader.rows_served))
            self._due = step
            self._checkpointer.load_only = True
        elif dist.get_rank() == 0:
            logger.warning(
                f"no checkpoint is failure.rollback_steps = {self._rollback_steps} steps older than the spike of step "
                f"{spike.step}: the run goes on as it is"
            )

    def go_back(self) -> None:
        """Go back to the checkpoint that was found, or to the last sound one before it, between steps.

        Raises:
            CheckpointError: none can be read, or nothing be written beside it.
        """
        assert self._due is not None
        step, self._due = self._due, None
        self._heartbeat.at("load")
        while True:
            try:
                self._go_back_to(step)
            except DamagedError as error:
                step = self._before_damage(step, error)
            else:
                return

    def _go_back_to(self, step: int) -> None:
        data = self._dataloader.state_dict()
        if dist.get_rank() == 0:
            rollback = Rollback(data["rows_served"], data["positions"].tolist(), self._watch.rollbacks)
            rollback.write(step_folder(self._checkpoints, step))
        dist.barrier()
        self._checkpointer.load_only = False
        self._checkpointer.load(step)

    def _before_damage(self, step: int, error: DamagedError) -> int:
        """Return the last step before one that is damaged, at which nothing says any more that the run went back to it.

        Raises:
            DamagedError: there is none.
        """
        found: list[int | None] = [None]
        if dist.get_rank() == 0:
            (step_folder(self._checkpoints, step) / ROLLBACK_NAME).unlink(missing_ok=True)
            found = [latest_before(self._checkpoints, step - 1)]
            logger.warning(f"{step_folder(self._checkpoints, step)} is passed over: {error}")
        dist.broadcast_object_list(found)
        if found[0] is None:
            raise error
        return found[0]

    def go_on(self, step: int) -> None:
        """Go where the data goes on, if a run has gone back to the step that was just loaded."""
        found: list[Rollback | None] = [None]
        if dist.get_rank() == 0 and step and "dataloader" not in self._checkpointer.exclude_from_loading:
            found = [read_rollback(step_folder(self._checkpoints, step))]
        dist.broadcast_object_list(found)
        # It is about one start of a run; what is loaded later is loaded whole.
        self._checkpointer.exclude_from_loading = []
        if (rollback := found[0]) is None:
            return
        if dist.get_rank() == 0:
            logger.info(f"After the rollback to step {step} the data goes on with row {rollback.rows_served}")
        self._dataloader.go_to(np.array(rollback.positions, dtype=np.int64), rollback.rows_served)
        self._watch.rollbacks = rollback.rollbacks
