"""What a checkpoint says of its run beside weights, optimizer and data, and what it means for a run that resumes."""

from contextlib import suppress
from typing import Any

import torch.distributed as dist

from blt_titan.checkpoint.description import Description
from blt_titan.config.resume import LOAD_STEP_NAME, RunStateError, run_checkpoints, step_to_load
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.patcher import EntropyPatcher, RowPatcher
from blt_titan.titan import logger


def describe_model(name: str, args: Any, patcher: RowPatcher) -> Description:
    """Return what model a run trains, as its checkpoints say it.

    The rule of its patches too: whoever generates with it must cut as it was trained.

    Args:
        name: `model.name`.
        args: the model's arguments.
        patcher: of the run's rows.
    """
    entropies = patcher.entropies.fingerprint if isinstance(patcher, EntropyPatcher) else ""
    return Description(name, args, patcher.rule, entropies)


def check_same_model(saved: str, own: Description) -> None:
    """Check that a checkpoint's model and the run's compute the same with the same weights.

    Args:
        saved: the checkpoint's description, as JSON.
        own: the run's.

    Raises:
        RunStateError: they differ; names in what.
    """
    if found := Description.from_json(saved, "the checkpoint").difference(own):
        raise RunStateError(f"the checkpoint {found}: set it as it was, or begin in another job.dump_folder")


def set_learning_rate(lr_schedulers: Any, next_step: int | None) -> None:
    """Have the schedule of this run, and not that of the checkpoint, say the learning rate of the next step.

    Args:
        lr_schedulers: torchtitan's container of them.
        next_step: to say the learning rate of in the log; None says nothing.
    """
    for scheduler in lr_schedulers.schedulers:
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]
    if next_step is not None:
        logger.info(f"The learning rate of step {next_step} is {groups[0]['lr']:g}")


def go_back_once(config: RunConfig) -> None:
    """Have `checkpoint.load_step` mean the newest step, if the run has gone back to it before; collective.

    A start without it forgets that, so that the run may be told to go back to the same step at another time.
    """
    settings = config.checkpoint
    if settings.load_step < 0 and not settings.load_only and dist.get_rank() == 0:
        with suppress(OSError):
            (run_checkpoints(config) / LOAD_STEP_NAME).unlink()
    found = [step_to_load(config) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    if found[0] != settings.load_step:
        logger.warning(
            f"checkpoint.load_step = {settings.load_step}: this run has gone back to it before, and goes on from the "
            f"newest step; to go back again, start once without it, or remove "
            f"{run_checkpoints(config) / LOAD_STEP_NAME}"
        )
        settings.load_step = -1
