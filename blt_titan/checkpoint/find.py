"""Which checkpoint a user means: the one that is named, or the newest sound one of a run."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.steps import complete_steps, is_complete, is_model_directory, step_folder
from blt_titan.checkpoint.verify import damage, damaged_weights

logger = logging.getLogger(__name__)


def latest_checkpoint(
    folder: str | os.PathLike[str],
    *,
    before: int | None = None,
    fault_of: Callable[[Path], str | None] = damage,
) -> Path:
    """Return the last checkpoint `step-N` in a run's checkpoint folder that is complete and sound; log which are not.

    Args:
        folder: of the checkpoints.
        before: the step that it shall be earlier than; None for any.
        fault_of: how it is told what is wrong with one.

    Raises:
        FileNotFoundError: if there is no complete one.
        CheckpointError: if all are damaged.
    """
    complete = {step: path for step, path in complete_steps(folder).items() if before is None or step < before}
    if not complete:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint (step-N with a .metadata file)")
    wrong = ""
    for path in reversed(complete.values()):
        if (found := fault_of(path)) is None:
            return path
        logger.warning(f"{path} is passed over: {found}")
        wrong = wrong or found
    raise CheckpointError(f"{folder}: none of its checkpoints is sound; the last: {wrong}")


def latest_before(folder: str | os.PathLike[str], step: int) -> int | None:
    """Return the last step up to `step` whose checkpoint is complete and sound; None if there is none.

    The seed checkpoint of step 0 is not looked at: it holds weights alone.
    """
    steps = [found for found in complete_steps(folder) if 0 < found <= step]
    return next((found for found in reversed(steps) if damage(step_folder(folder, found)) is None), None)


def holds_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a checkpoint `step-N`, or a folder of a run that holds one, sound or not."""
    path = Path(path)
    return not is_model_directory(path) and (is_complete(path) or _folder_of_checkpoints(path) is not None)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that a user means: `step-N` itself, or the last one of a run's folder with sound weights.

    To choose among several, every byte of the weights is read; of one that is named, when it is loaded.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    if is_model_directory(path):
        raise CheckpointError(
            f"{path}: is a model directory (it has a config.json), where a training checkpoint is wanted; "
            "`blt-titan import` makes one of it"
        )
    if is_complete(path):
        if (found := damage(path)) is not None:
            raise CheckpointError(found)
        return path
    if (folder := _folder_of_checkpoints(path)) is not None:
        return latest_checkpoint(folder, fault_of=damaged_weights)
    raise CheckpointError(
        f"{path}: neither a complete checkpoint (a step-N folder with a .metadata file) nor a folder that holds one"
    )


def _folder_of_checkpoints(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "checkpoint") if complete_steps(folder)), None)
