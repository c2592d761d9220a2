"""Checkpoints of a run: torchtitan's manager, with what it lacks.

- What is read may come from strangers, and cannot run (`checkpoint/read.py`).
- What is written carries digests (`checkpoint/digests.py`). A step that is damaged is named and passed over.
- Weights that are not finite are not saved, nor is anything where the run's folder is no longer there.
- `keep_latest_k` are left, no more, once a save is complete: torchtitan counts when one begins, and not at the last.
- Settings of optimizer and schedule are those that the run says, not those of the checkpoint.
- What cannot be read or written is one sentence; a save beside the training that fails is noticed by the next step.
"""

import gc
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from blt_titan.checkpoint.load import cannot_read
from blt_titan.checkpoint.read import CheckpointError, DamagedError, SafeLoadPlanner, SafeReader, brief
from blt_titan.checkpoint.steps import METADATA, complete_steps, set_aside, stale_steps, step_folder, step_of, unmark
from blt_titan.checkpoint.storage_writer import DigestWriter
from blt_titan.config.resume import RunStateError, newest_sound
from blt_titan.data.store.errors import DataError
from blt_titan.titan import MODEL, OPTIMIZER, CheckpointManager, logger
from blt_titan.training.error_causes import is_of_a_collective
from blt_titan.training.failures import NonFiniteLossError
from blt_titan.training.finite import are_finite, not_finite
from blt_titan.training.run_folder import LOCK_NAME

# torch's own derives from BaseException.
_SAVE_ERRORS = (CheckpointException, OSError, EOFError, RuntimeError, pickle.PickleError)


class Saving(NamedTuple):
    """What saves have cost."""

    saves: int = 0
    """How many were begun."""
    waited_s: float = 0.0
    """How long training has waited for them, and for those that were begun before."""


class RunCheckpoints(CheckpointManager):
    """Loads and saves a run's checkpoints; collective over all ranks.

    Attributes:
        on_loaded: called after `load`, whether there was a checkpoint or not.
    """

    on_loaded: Callable[[], None] | None = None
    _spent = Saving()

    def __init__(self, *args: Any, base_folder: str = "", **options: Any):
        super().__init__(*args, base_folder=base_folder, **options)
        self._loading: int | None = None
        """The step that was chosen."""
        self._damaged: tuple[int, DamagedError] | None = None
        """The last step that was passed over as a rank read it."""
        self._saving: int | None = None
        """The step of a save that is not known to be complete."""
        lock = Path(base_folder) / LOCK_NAME
        self._witness = lock if lock.exists() else None
        """What is there as long as the folder is the run's: its lock, then its last checkpoint."""

    def load(self, step: int = -1) -> bool:
        """Load step `step`, or the newest sound one; tell whether there was one.

        Raises:
            CheckpointError: it cannot be read.
        """
        if not self.enable:
            return False
        self._loading = step if step >= 0 else None
        with self._own_settings():
            loaded = super().load(step) if step >= 0 else self._load_newest()
        if loaded and self._loading is not None:
            self._witness = step_folder(self.folder, self._loading) / METADATA
        if self.on_loaded is not None:
            self.on_loaded()
        return loaded

    def _load_newest(self) -> bool:
        """Load the newest step of which all that is read is what was written; all ranks pass over the same."""
        while True:
            try:
                return super().load()
            except DamagedError as error:
                if self._loading is None:  # it is not of this run's folder, but what the run was told to begin from
                    raise
                logger.warning(f"{step_folder(self.folder, self._loading)} is passed over: {error}")
                self._damaged = self._loading, error

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save if it is due.

        Raises:
            CheckpointError: it could not be written, this one or the one before it.
            RuntimeError: a rank was lost meanwhile.
            NonFiniteLossError: a weight is not finite.
        """
        if not self._should_save(curr_step, last_step):
            return
        self._spent = self._spent._replace(saves=self._spent.saves + 1)
        with self._waited():
            self._async_wait()
            self._check_before(curr_step)
            try:
                super().save(curr_step, last_step)
            except _SAVE_ERRORS as error:
                raise self._failed_save(curr_step, error) from error
        self._saving = curr_step
        if self.save_future is None:
            self._settle()

    def maybe_wait_for_staging(self) -> None:
        """Wait until what is saved has left the device, before a step changes it."""
        if self.enable_staging and self.staging:
            with self._waited():
                super().maybe_wait_for_staging()

    @contextmanager
    def _waited(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent = self._spent._replace(waited_s=self._spent.waited_s + time.perf_counter() - began)

    def take_saving(self) -> Saving:
        """Return what saves have cost since the last call."""
        taken, self._spent = self._spent, Saving()
        return taken

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
        self._async_wait()

    def has_failed(self) -> bool:
        """Look after a save beside the training; tell whether it failed, which the next `save` or `save_now` says."""
        if not self.enable or self.save_future is None or not self.save_future.done():
            return False
        if self.save_future.exception() is not None:
            return True
        self._settle()
        return False

    def _async_wait(self) -> None:
        """Wait for a save beside the training.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            super()._async_wait()
        except _SAVE_ERRORS as error:
            assert self._saving is not None
            raise self._failed_save(self._saving, error) from error
        self._settle()

    def _settle(self) -> None:
        """Make room for the next, now that what was being saved is complete."""
        self.save_future = None
        if self._saving is None:
            return
        self._witness = step_folder(self.folder, self._saving) / METADATA
        self._saving = None
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for path in stale_steps(self.folder, self.keep_latest_k):
                # Removed in a thread of torchtitan's, which may be killed amid it.
                with suppress(OSError):
                    unmark(path)
                self.purge_queue.put(str(path))
            for path in set_aside(self.folder)[:-1]:
                self.purge_queue.put(str(path))

    def _purge_stale_checkpoints(self) -> None:
        """Do nothing: torchtitan calls it when a save may only have begun; see `_settle`."""

    def _check_before(self, step: int) -> None:
        """Look at what is to be saved, and where; all ranks come to the same verdict.

        Raises:
            NonFiniteLossError: a weight is not finite.
            CheckpointError: the run's folder has gone.
        """
        named = [pair for part in self.states[MODEL].model for pair in part.named_parameters()]
        finite = are_finite(parameter for _, parameter in named)
        is_there = self._witness is None or os.path.exists(self._witness)
        verdict = torch.stack([finite, torch.full_like(finite, is_there)]).int()
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        all_finite, all_there = verdict.tolist()
        if not all_there:
            raise CheckpointError(
                f"{self.folder}: step {step} is not saved, because the folder is not what it was "
                f"({self._witness} is gone): see that its file system is mounted, and start again"
            )
        if not all_finite:
            found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, not_finite(named))
            names = sorted({name for of_rank in found for name in of_rank})
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise NonFiniteLossError(
                f"the weights of step {step} are not finite ({', '.join(names[:3])}{more}), so that they are not "
                f"saved; {self._saved_before(step)}. Lower optimizer.lr, or look at the data before that step"
            )

    def _saved_before(self, step: int) -> str:
        steps = [saved for saved in complete_steps(self.folder) if saved < step]
        return f"step-{steps[-1]} was saved before" if steps else "nothing was saved before"

    def _failed_save(self, step: int, error: BaseException) -> Exception:
        """Return what ends the run: that a rank was lost while all saved says nothing against the folder."""
        if is_of_a_collective(error):
            return RuntimeError(f"a rank was lost while step {step} was saved; {self._saved_before(step)} ({error})")
        cause = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        said = f"{cause.strerror}" if isinstance(cause, OSError) and cause.strerror else brief(cause)
        with suppress(OSError):
            disk = shutil.disk_usage(self.folder)
            said += f"; {disk.free / 1e9:,.2f} of {disk.total / 1e9:,.2f} GB are free there"
        return CheckpointError(
            f"{step_folder(self.folder, step)}: a checkpoint could not be written ({said}); "
            f"{self._saved_before(step)}: make room there, or see that it can be written, and start again"
        )

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: Any,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Write a step's folder, with digests; returns what torchtitan waits for."""
        assert not to_hf, "refused with the settings"
        writer, saved = DigestWriter(checkpoint_id), None
        if async_mode == "async":
            saved = async_save(state_dict, storage_writer=writer, process_group=self.pg)
        elif async_mode == "async_with_pinned_mem":
            saved = async_save(
                state_dict,
                storage_writer=writer,
                process_group=self.pg,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
        else:
            save(state_dict, storage_writer=writer)
        if enable_garbage_collection:
            gc.collect(1)
        return saved

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
            if is_of_a_collective(error):
                raise RuntimeError(f"a rank was lost while {checkpoint_id} was read ({error})") from error
            raise cannot_read(checkpoint_id, error) from error
        self.states[MODEL].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        """Return the newest sound step; rank 0 looks, so that all take the same.

        Raises:
            CheckpointError: there are steps, but none is sound.
        """
        found: list[Any] = [None]
        folder, (before, damaged) = folder or self.folder, self._damaged or (None, None)
        if dist.get_rank() == 0:
            try:
                path = newest_sound(folder, before=before)
                found = [-1 if path is None else step_of(path)]
                if path is None and damaged is not None:
                    found = [CheckpointError(f"{folder}: none of its checkpoints is sound; the last: {damaged}")]
            except CheckpointError as error:
                found = [error]
        dist.broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        self._loading = None if found[0] == -1 else found[0]
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
