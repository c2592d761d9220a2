r"""List, verify, prune or roll back the checkpoints of a run.

    blt-titan checkpoint list outputs/blt_1b
    blt-titan checkpoint verify outputs/blt_1b --step 20000
    blt-titan checkpoint prune outputs/blt_1b --keep 3 --dry-run
    blt-titan checkpoint rollback outputs/blt_1b --step 15000

FOLDER is of a run, or of its checkpoints; `verify` also takes one checkpoint. `list` looks at each, without
reading tensors. `verify` compares every byte with the digests that were written with it, and names each damaged file.
`prune` keeps the newest sound ones and removes what is older. `rollback` sets later steps aside, so that the next start
goes on from --step. The last two are refused while a run holds its folder.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli

from blt_titan.checkpoint.digests import recorded
from blt_titan.checkpoint.read import CheckpointError, SafeReader
from blt_titan.checkpoint.steps import (
    METADATA,
    complete_steps,
    is_complete,
    is_model_directory,
    set_aside,
    set_later_aside,
    stale_steps,
    step_folder,
    step_folders,
    unmark,
)
from blt_titan.checkpoint.verify import damage, entries_of_files, faults
from blt_titan.commands.arguments import Parser, existing_directory, whole
from blt_titan.commands.ending import command
from blt_titan.progress import ProgressBar
from blt_titan.training.run_folder import CONFIG_NAME, LOCK_NAME, RunFolderError, RunLock

NAME = "blt-titan checkpoint"
_APPLIES = {
    "step": ("verify", "rollback"),
    "json": ("list", "verify"),
    "keep": ("prune",),
    "abandoned": ("prune",),
    "half_written": ("prune",),
    "dry_run": ("prune", "rollback"),
    "no_verify": ("prune", "rollback"),
    "no_progress": ("verify", "prune", "rollback"),
}
"""What each option is for; elsewhere it is refused."""
_STEP = whole(0, 2**62)


class DamagedStepError(CheckpointError):
    """A step that should be gone back to is not sound."""


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} list|verify|prune|rollback FOLDER [options]")
    parser.add_argument("what", metavar="WHAT", choices=("list", "verify", "prune", "rollback"), help="what to do")
    parser.add_argument("folder", type=existing_directory, metavar="FOLDER", help="the folder of a run")
    add = parser.add_argument_group("which").add_argument
    add("--step", type=_STEP, metavar="N", help="the step to verify (default: all), or to go back to")
    add("--keep", type=whole(1, 10**6), metavar="K", help="sound checkpoints that prune keeps (default: all)")
    add("--abandoned", action="store_true", help="prune also what was set aside (abandoned-*)")
    add("--half-written", action="store_true", help="prune also what no save completed")
    add = parser.add_argument_group("how").add_argument
    add("--dry-run", action="store_true", help="say what would be done, and do nothing")
    add("--no-verify", action="store_true", help="look at what is kept or gone back to, but do not read every byte")
    add("--json", action="store_true", help="print one JSON object")
    add("--no-progress", action="store_true", help="show no progress bar")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    for name, verbs in _APPLIES.items():
        if args.what not in verbs and getattr(args, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')}: is for {' and '.join(verbs)}, not for {args.what}")
    if args.what == "rollback" and args.step is None:
        parser.error("rollback: needs --step N, the step to go back to")
    if args.what == "prune" and not (args.keep or args.abandoned or args.half_written):
        parser.error("prune: name what to remove: --keep K, --abandoned, --half-written")
    return args


@command(NAME, CheckpointError, RunFolderError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, 1 if something is damaged, 2 if it cannot be done."""
    args = parse_args(arguments)
    logging.basicConfig(format=f"{NAME}: %(message)s")
    try:
        return {"list": _list, "verify": _verify, "prune": _prune, "rollback": _roll_back}[args.what](args)
    except DamagedStepError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1


@dataclass(frozen=True)
class _Listed:
    """What `list` says of a checkpoint."""

    step: int
    path: str
    bytes: int
    saved: str
    complete: bool
    digests: bool
    damage: str | None
    set_aside: bool


def _list(args: argparse.Namespace) -> int:
    folder, _ = _folders(args.folder)
    listed = [_look(step, path) for step, path in step_folders(folder).items()]
    for aside in set_aside(folder):
        listed += [_look(step, path, set_aside=True) for step, path in step_folders(aside).items()]
    if args.json:
        print(json.dumps({"folder": str(folder), "checkpoints": [asdict(one) for one in listed]}, indent=2))
        return 0
    print(f"{'step':>10}{'GiB':>10}  {'saved':<21}state")
    for one in listed:
        state = "half written" if not one.complete else f"damaged: {one.damage}" if one.damage else "looks sound"
        notes = [state]
        if one.complete and not one.damage and not one.digests:
            notes.append("no digests")
        if one.set_aside:
            notes.append(f"set aside in {Path(one.path).parent.name}")
        print(f"{one.step:>10}{one.bytes / 2**30:>10.3f}  {one.saved:<21}{', '.join(notes)}")
    return 0


def _look(step: int, path: Path, *, set_aside: bool = False) -> _Listed:
    complete = is_complete(path)
    fault = damage(path) if complete else None
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    saved = max([(path / METADATA).stat().st_mtime] if complete else [file.st_mtime for file in files], default=0.0)
    return _Listed(
        step=step,
        path=str(path),
        bytes=sum(file.st_size for file in files),
        saved=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved)) if saved else "",
        complete=complete,
        digests=complete and fault is None and _has_digests(path),
        damage=fault,
        set_aside=set_aside,
    )


def _verify(args: argparse.Namespace) -> int:
    given = Path(args.folder)
    if is_complete(given):
        if args.step is not None:
            raise CheckpointError(f"--step {args.step}: {given} is one checkpoint; name the folder of its run")
        chosen = [given]
    else:
        folder, _ = _folders(given)
        complete = complete_steps(folder)
        chosen = list(complete.values()) if args.step is None else [_step(folder, args.step)]
        if not chosen:
            raise CheckpointError(f"{folder}: holds no complete checkpoint (step-N with a .metadata file)")
    found = {path: list(_read(path, progress=not args.no_progress)) for path in chosen}
    without = [path for path in chosen if not found[path] and not _has_digests(path)]
    for path, sentences in found.items():
        for sentence in sentences:
            print(f"damaged: {sentence}", file=sys.stderr)
        if not args.json and not sentences:
            note = "looks sound; it was written without digests" if path in without else "sound"
            print(f"{path}: {note}")
    if args.json:
        said = [{"path": str(p), "damaged": found[p], "digests": p not in without} for p in chosen]
        print(json.dumps({"checkpoints": said}, indent=2))
    return int(any(found.values()))


def _prune(args: argparse.Namespace) -> int:
    folder, run = _folders(args.folder)
    with _held(run):
        stale: list[Path] = []
        if args.keep:
            stale = stale_steps(folder, args.keep, is_kept=lambda path: _is_sound(path, args))
            stale = [path for path in stale if is_complete(path)]
        if args.half_written:
            steps = step_folders(folder).values()
            stale += [path for path in steps if not is_complete(path) and not is_model_directory(path)]
        if args.abandoned:
            stale += set_aside(folder)
        for path in stale:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**30
            print(f"{'would remove' if args.dry_run else 'removed'} {path} ({size:.3f} GiB)", flush=True)
            if not args.dry_run:
                unmark(path)
                shutil.rmtree(path)
    if not stale:
        print(f"{folder}: nothing to remove")
    return 0


def _roll_back(args: argparse.Namespace) -> int:
    folder, run = _folders(args.folder)
    with _held(run):
        path = _step(folder, args.step)
        fault = damage(path) if args.no_verify else next(_read(path, progress=not args.no_progress), None)
        if fault is not None:
            raise DamagedStepError(f"--step {args.step}: {fault}; nothing was changed")
        later = [path for step, path in step_folders(folder).items() if step > args.step]
        for one in later:
            fate = "set aside" if is_complete(one) else "removed, as it is half written"
            print(f"{one}: {'would be ' if args.dry_run else ''}{fate}")
        if not args.dry_run:
            logging.getLogger("blt_titan.checkpoint.steps").setLevel(logging.ERROR)  # it is said above
            set_later_aside(folder, args.step)
    print(f"the next start {'would go' if args.dry_run else 'goes'} on from {path.name}")
    return 0


def _is_sound(path: Path, args: argparse.Namespace) -> bool:
    """Tell whether a checkpoint is one to keep; say what is wrong with one that is not."""
    if not is_complete(path):
        return False
    fault = damage(path) if args.no_verify else next(_read(path, progress=not args.no_progress), None)
    if fault is not None:
        print(f"{NAME}: not counted: {fault}", file=sys.stderr)
    return fault is None


def _read(path: Path, *, progress: bool) -> Iterator[str]:
    """Compare every byte of a checkpoint; yield what is wrong with each damaged file."""
    total = sum(file.stat().st_size for file in path.glob("*.distcp"))
    with ProgressBar(total=total, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar:
        yield from faults(path, reads=lambda name: True, on_bytes=bar.update)


def _has_digests(path: Path) -> bool:
    entries = entries_of_files(SafeReader(path).read_metadata()).values()
    return all(recorded(info) is not None for of_file in entries for _, info in of_file)


def _step(folder: Path, step: int) -> Path:
    if step not in (complete := complete_steps(folder)):
        there = ", ".join(map(str, complete)) or "none"
        raise CheckpointError(f"--step {step}: {folder} has no such complete step; it has {there}")
    return step_folder(folder, step)


def _folders(given: str | Path) -> tuple[Path, Path | None]:
    """Return the folder of checkpoints that is meant, and that of its run, if it has one.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    given = Path(given)
    for folder in (given, given / _checkpoints_of(given)):
        steps = step_folders(folder).values()
        # Exports are step-N too, and no checkpoints.
        if not all(map(is_model_directory, steps)) or (not steps and set_aside(folder)):
            above = (folder, *folder.absolute().parents)
            return folder, next((run for run in above if (run / LOCK_NAME).exists()), None)
    raise CheckpointError(f"{given}: neither the folder of a run with checkpoints nor that of checkpoints (step-N)")


def _checkpoints_of(run: Path) -> str:
    """Return where a run keeps its checkpoints, as its settings say."""
    try:
        folder = tomli.loads((run / CONFIG_NAME).read_text())["checkpoint"]["folder"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        folder = "checkpoint"
    return folder if isinstance(folder, str) else "checkpoint"


@contextmanager
def _held(run: Path | None) -> Iterator[None]:
    """Hold the folder of a run; that of none needs no lock.

    Raises:
        RunFolderError: a run holds it.
    """
    if run is None:
        yield
        return
    lock = RunLock(run)
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main())
