"""Step folders: `step-N` holds what a run saved at step N. Their names are written and parsed here, and nowhere else.

In: the folder of a run's checkpoints, or of its exports. Out: paths by step. No torch is imported, so that the server
of plots may look too.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

METADATA = ".metadata"
"""The file of a checkpoint that is written last."""
_PREFIX = "step-"
_ASIDE = "abandoned-"


def step_folder(folder: str | os.PathLike[str], step: int) -> Path:
    """Return where a step is saved.

    >>> step_folder("outputs/debug/checkpoint", 150).name
    'step-150'
    """
    return Path(folder) / f"{_PREFIX}{step}"


def step_of(path: Path) -> int | None:
    """Return the step that a folder's name says; None if it is the name of something else.

    >>> step_of(Path("checkpoint/step-150")), step_of(Path("step-0150")), step_of(Path("step-150.log"))
    (150, None, None)
    """
    digits = path.name.removeprefix(_PREFIX)
    if not path.name.startswith(_PREFIX) or not (digits.isascii() and digits.isdigit()):
        return None
    return int(digits) if digits == str(int(digits[:20])) else None


def step_folders(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Return all folders `step-N` by their step, ascending; half-written ones too."""
    found = {step: path for path in Path(folder).glob(f"{_PREFIX}*") if (step := step_of(path)) is not None}
    return {step: found[step] for step in sorted(found) if found[step].is_dir()}


def is_complete(path: Path) -> bool:
    """Tell whether a folder is a checkpoint that was written to its end.

    A folder with a `config.json` is a Hugging Face directory, never a checkpoint.
    """
    return (path / METADATA).is_file() and not is_model_directory(path)


def is_model_directory(path: Path) -> bool:
    """Tell whether a folder is a Hugging Face directory, by its `config.json`."""
    return os.path.lexists(path / "config.json")


def complete_steps(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the complete checkpoints of a folder by their step, ascending."""
    return {step: path for step, path in step_folders(folder).items() if is_complete(path)}


def is_whole(path: Path) -> bool:
    """Tell whether a folder is a checkpoint, or a Hugging Face directory, and not what was left of making one."""
    return is_complete(path) or is_model_directory(path)


def set_later_aside(folder: str | os.PathLike[str], step: int, *, is_kept: Callable[[Path], bool] = is_whole) -> None:
    """Make room for the steps that a run will make again: move later ones to `abandoned-TIME`, and log it.

    A save over an old checkpoint would leave the old `.metadata` beside half-written files, and a later resume would
    prefer the abandoned steps.

    Args:
        folder: of the steps.
        step: at which the run resumes.
        is_kept: of a later folder, whether it is worth keeping; others are removed.
    """
    # Not beside them by the name step-N: torchtitan would find it there.
    aside = Path(folder) / f"{_ASIDE}{time.strftime('%Y%m%d-%H%M%S')}"
    for later, path in step_folders(folder).items():
        if later <= step:
            continue
        if not is_kept(path):
            logger.warning(f"{path} is half written: removed")
            shutil.rmtree(path)
            continue
        logger.warning(f"{path} is later than the step {step} that this run resumes at: moved to {aside / path.name}")
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)


def set_aside(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the folders of steps that were set aside, the latest last."""
    return sorted(path for path in Path(folder).glob(f"{_ASIDE}*") if path.is_dir())


def stale_steps(
    folder: str | os.PathLike[str], keep: int, *, is_kept: Callable[[Path], bool] = is_complete
) -> list[Path]:
    """Return the steps that are older than the `keep` newest, half-written ones too; none if there are not so many.

    Args:
        folder: of the steps.
        keep: how many stay, 1 at least.
        is_kept: of a step, whether it is one of those; asked of the newest first, until there are enough.
    """
    steps = step_folders(folder)
    for step in reversed(steps):
        keep -= is_kept(steps[step])
        if not keep:
            return [path for older, path in steps.items() if older < step]
    return []


def unmark(path: Path) -> None:
    """Have a step pass for half written, so that one that is being removed never passes for a checkpoint."""
    (path / METADATA).unlink(missing_ok=True)
