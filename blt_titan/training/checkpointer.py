"""Checkpoints of a run: torchtitan's manager, with what it lacks.

- What is read may come from strangers, and cannot run (`checkpoint/read.py`).
- A step that a killed machine left damaged is named and passed over; the newest sound one is taken.
- Settings of optimizer and schedule are those that the run says, not those of the checkpoint.
- What cannot be read or written is one sentence.
"""

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from blt_titan.checkpoint.load import cannot_read
from blt_titan.checkpoint.read import CheckpointError, SafeLoadPlanner, SafeReader, brief
from blt_titan.checkpoint.steps import step_of
from blt_titan.config.resume import RunStateError, newest_sound
from blt_titan.data.store.errors import DataError
from blt_titan.titan import MODEL, OPTIMIZER, CheckpointManager

# torch's own derives from BaseException.
_SAVE_ERRORS = (CheckpointException, OSError, EOFError, RuntimeError, pickle.PickleError)


class RunCheckpoints(CheckpointManager):
    """Loads and saves a run's checkpoints; collective over all ranks.

    Attributes:
        on_loaded: called after `load`, whether there was a checkpoint or not.
        waited_s: how long training has waited for saves since somebody set it to 0.
    """

    on_loaded: Callable[[], None] | None = None
    waited_s: float = 0.0

    def load(self, step: int = -1) -> bool:
        """Load step `step`, or the newest sound one; tell whether there was one.

        Raises:
            CheckpointError: it cannot be read.
        """
        if not self.enable:
            return False
        with self._own_settings():
            loaded = super().load(step)
        if self.on_loaded is not None:
            self.on_loaded()
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save if it is due.

        Raises:
            CheckpointError: it could not be written, this one or the one before it.
        """
        if not self._should_save(curr_step, last_step):
            return
        with self._waited():
            try:
                super().save(curr_step, last_step)
            except _SAVE_ERRORS as error:
                raise self._not_written(curr_step, error) from error

    def maybe_wait_for_staging(self) -> None:
        """Wait until what is saved has left the device, before a step changes it."""
        if self.enable_staging and self.staging:
            with self._waited():
                super().maybe_wait_for_staging()

    @contextmanager
    def _waited(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began

    def _not_written(self, step: int, error: BaseException) -> CheckpointError:
        cause = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        return CheckpointError(
            f"{self.folder}: a checkpoint could not be written at step {step} ({brief(cause)}); the steps "
            "before it are sound: make room there, or see that it can be written, and start again"
        )

    def save_now(self, step: int) -> None:
        """Have `step` saved when this returns, whether it is due or not; collective.

        Raises:
            CheckpointError: it could not be written.
        """
        if step % self.interval:
            interval, self.interval = self.interval, 1
            try:
                self.save(step)
            finally:
                self.interval = interval
        try:
            self._async_wait()
        except _SAVE_ERRORS as error:
            raise self._not_written(step, error) from error

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Read what `state_dict` names."""
        assert not from_hf, "refused with the settings"
        # torch would log what is wrong with it as a traceback, and look for other metadata.
        SafeReader(checkpoint_id).read_metadata()
        try:
            load(state_dict, storage_reader=SafeReader(checkpoint_id), planner=SafeLoadPlanner())
        except (RunStateError, DataError):  # of what took the state over
            raise
        except (CheckpointException, Exception) as error:  # what damaged bytes raise in torch is of many kinds
            raise cannot_read(checkpoint_id, error) from error
        self.states[MODEL].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        """Return the newest sound step; rank 0 looks, so that all take the same."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                path = newest_sound(folder or self.folder)
                found = [-1 if path is None else step_of(path)]
            except CheckpointError as error:
                found = [error]
        dist.broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return found[0]

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Put back the settings of the optimizers; the trainer asks the schedule for the learning rate."""
        groups = [group for optimizer in self.states[OPTIMIZER] for group in optimizer.param_groups]
        said = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        yield
        # Loading may have replaced the groups.
        groups = [group for optimizer in self.states[OPTIMIZER] for group in optimizer.param_groups]
        for group, settings in zip(groups, said, strict=True):
            group.update(settings)
