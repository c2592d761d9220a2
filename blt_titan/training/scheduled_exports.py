"""When a run's checkpoints become Hugging Face directories (`export.hf_every`): rank 0 exports, all wait at the end."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from blt_titan.checkpoint.description import Description
from blt_titan.config.run_config import RunConfig
from blt_titan.job_config import Export
from blt_titan.training.exports import HFExports
from blt_titan.training.preemption import PreemptedError, Preemption

_LONGEST_EXPORT = timedelta(hours=12)
"""All ranks wait for the last export, which may take longer than a collective of training ever should."""


class ScheduledExports:
    """The exports of a run, on each of its ranks; building it is collective.

    Args:
        export: the run's settings.
        checkpoints: the folder of the run's `step-N`.
        out: the folder to write directories in.
        description: of the model, as its checkpoints have it.
        entropy_checkpoint: of the entropy model that cuts the run's patches, if it scores while it trains.
        custom_import: module that registers the run's own patching rules, if there is one.
        interval: steps between checkpoints.
        last_step: of the run, which is exported in any case.
    """

    def __init__(
        self,
        export: Export,
        *,
        checkpoints: Path,
        out: Path,
        description: Description,
        entropy_checkpoint: str | None,
        custom_import: str,
        interval: int,
        last_step: int,
    ):
        self._every, self._interval, self._last_step = export.hf_every, interval, last_step
        self._group: Any = dist.new_group(backend="gloo", timeout=_LONGEST_EXPORT)
        self._exports: HFExports | None = None
        if dist.get_rank() == 0:
            self._exports = HFExports(
                checkpoints,
                out,
                description=description,
                entropy_checkpoint=export.entropy_checkpoint or entropy_checkpoint,
                dtype=export.dtype,
                force=export.force,
                custom_import=custom_import,
            )

    @classmethod
    def of_run(cls, config: RunConfig, description: Description) -> "ScheduledExports":
        """Make the exports that a run's settings ask for."""
        folder = Path(config.job.dump_folder)
        return cls(
            config.export,
            checkpoints=folder / config.checkpoint.folder,
            out=folder / "hf",
            description=description,
            entropy_checkpoint=config.patching.entropy_checkpoint,
            custom_import=config.experimental.custom_import,
            interval=config.checkpoint.interval,
            last_step=config.training.steps,
        )

    def resume_at(self, step: int) -> None:
        """Go on with what an earlier start of the run left undone up to `step`; at 0 what is there is another run's."""
        if self._exports is not None:
            self._exports.go_on_from(step, self._is_exported)

    def after_step(self, step: int, *, saves: bool) -> None:
        """Look after exports, and add the step's own if it `saves` one: it is exported once it is complete."""
        if self._exports is None:
            return
        if saves and self._is_exported(step):
            self._exports.add(step)
        self._exports.poll()

    def finish(self, preemption: Preemption) -> None:
        """Wait for all exports; collective.

        Args:
            preemption: of the run, which may be told to leave meanwhile.

        Raises:
            ExportFailedError: on rank 0, one failed.
            PreemptedError: on all, it was; the same command goes on with them.
        """
        leaves = [False]
        try:
            if self._exports is not None:
                leaves = [not self._exports.finish(lambda: bool(preemption.told))]
        finally:
            dist.broadcast_object_list(leaves, group=self._group)
        if leaves[0]:
            raise PreemptedError(
                f"told to leave by {preemption.name}: the run is complete, its exports are not; the same command goes "
                "on with them"
            )

    def stop(self) -> None:
        """End what is under way; the run that resumes this one does it."""
        if self._exports is not None:
            self._exports.stop()

    def _is_exported(self, step: int) -> bool:
        if step == 0:  # a seed checkpoint
            return False
        checkpoints, beside = divmod(step, self._interval)
        return step == self._last_step or (not beside and checkpoints % self._every == 0)
