"""Check everything that needs a GPU, in stages that each write a file as they go; `scripts/gpu_check.sh` calls it.

scripts/gpu_check.sh --list
scripts/gpu_check.sh --stage tests --stage train-1b --out outputs/gpu_check
scripts/gpu_check.sh --device cpu --tiny

Each stage writes OUT/STAGE.json after each of its parts, so that a machine which goes away leaves what was measured; it
runs in a process of its own where several are asked for, so that one which dies leaves the others. For `memory`, first
`blt-titan check-cuda --config blt_1b --world-size 1 --memory-only --json OVERRIDES > PREDICTIONS/CASE.json` on any
machine, with the cases and overrides that --list shows. Exit code 0 if all went well, 1 if a part failed, 2 if asked
wrongly, 3 without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from blt_titan.commands.arguments import Parser, existing_directory, output_directory, whole
from blt_titan.commands.ending import command
from blt_titan.data.store.errors import DataError
from blt_titan.gpu_check.stage import Place, StageError, run_stage, write
from blt_titan.gpu_check.stages import STAGES
from blt_titan.gpu_check.training import MEMORY_CASES

NAME = "gpu_check"
NO_GPU = 3


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__)
    what = parser.add_argument_group("what is checked")
    what.add_argument(
        "--stage",
        action="append",
        choices=list(STAGES),
        help="a stage to run; may be repeated (default: all, in the order of --list)",
    )
    what.add_argument("--list", action="store_true", help="print the stages and the cases of `memory`, and end")
    what.add_argument(
        "--predictions",
        type=existing_directory,
        metavar="DIR",
        help="folder of files of `blt-titan check-cuda --json`, for the stage `memory` (default: none are compared)",
    )
    where = parser.add_argument_group("where, and how large")
    where.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default %(default)s")
    where.add_argument("--tiny", action="store_true", help="models and rows of a test: shows that each stage works")
    where.add_argument(
        "--timeout",
        type=whole(1, 86_400),
        default=600,
        metavar="SECONDS",
        help="after which a stage is stopped, where several run (default %(default)s)",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out",
        type=output_directory,
        default="outputs/gpu_check",
        metavar="DIR",
        help="folder of the figures, made if missing (default %(default)s)",
    )
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, DataError, StageError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; give the exit code."""
    args = parse_args(arguments)
    if args.list:
        print("\n".join(listed()))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"{NAME}: no CUDA device is at hand; nothing was checked (--device cpu --tiny shows that the stages work)",
            file=sys.stderr,
        )
        return NO_GPU
    if args.device == "cpu" and not args.tiny:
        raise StageError("--device cpu: takes --tiny too; the full sizes are for a GPU")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    names = args.stage or list(STAGES)
    results = [_alone(names[0], args, out)] if len(names) == 1 else [_in_process(n, args, out) for n in names]
    for name, result in zip(names, results, strict=True):
        print(f"{name:<12}{'ok' if result['ok'] else 'FAILED':<8}{result.get('seconds', 0):>7.0f} s  {out / name}.json")
        print("".join(f"{'':<12}{sentence}\n" for sentence in remarks(result)), end="")
    return 0 if all(result["ok"] for result in results) else 1


def listed() -> list[str]:
    """Return the lines of `--list`."""
    width = max(map(len, STAGES))
    lines = [f"{name:<{width}}  {stage.summary}" for name, stage in STAGES.items()]
    cases = [f"  {case}: {' '.join(overrides)}" for case, overrides in MEMORY_CASES.items()]
    return [*lines, "", "cases of `memory`, overrides of blt_1b:", *cases]


def remarks(found: Any, where: str = "") -> list[str]:
    """Return a sentence for each part of a result that failed or was skipped."""
    if not isinstance(found, dict):
        return []
    said = [f"{where or 'stage'}: {key}: {found[key]}" for key in ("failed", "skipped") if key in found]
    return said + [sentence for key, part in found.items() for sentence in remarks(part, f"{where}.{key}".strip("."))]


def _alone(name: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        predictions = None if args.predictions is None else Path(args.predictions)
        place = Place(args.device, args.tiny, Path(folder), predictions)
        return run_stage(
            name, STAGES[name], place, out / f"{name}.json", " ".join(["scripts/gpu_check.sh", *_asked(name, args)])
        )


def _asked(name: str, args: argparse.Namespace) -> list[str]:
    words = ["--stage", name, "--device", args.device, "--out", args.out]
    words += ["--tiny"] if args.tiny else []
    return words + ([] if args.predictions is None else ["--predictions", args.predictions])


def _in_process(name: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run a stage in a process of its own; return what its file says, or why there is none."""
    print(f"{NAME}: {name}", file=sys.stderr, flush=True)
    file = out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.gpu_check", *_asked(name, args)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=args.timeout)
        why = f"its process ended with exit code {process.returncode}: {' '.join(said.splitlines()[-5:])}"
    except subprocess.TimeoutExpired:
        why = f"it was stopped after {args.timeout} s"
    finally:
        if process.poll() is None:  # too long, or Ctrl-C: with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"stage": name}
    if not result.get("finished"):
        result |= {"ok": False, "failed": why}
        write(file, result)
    return result


if __name__ == "__main__":
    sys.exit(main())
