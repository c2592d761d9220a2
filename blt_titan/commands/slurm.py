"""Write a Slurm batch script that trains on several nodes, saves when it is told to leave, and is queued again.

    blt-titan slurm blt_8b --nodes 8 --out train.sbatch
    blt-titan slurm my.toml --nodes 2 --gpus-per-node 4 --sbatch partition=gpu --sbatch time=24:00:00
    blt-titan slurm blt_1b --nodes 1 --array 0-3 '--debug.seed=$SLURM_ARRAY_TASK_ID'

Slurm sends SIGUSR1 before the time is up or the nodes are taken (--leave-before), the run saves and ends with exit code
75, and the script has itself queued again; a node that fails is the same without the save. What was cancelled is not,
nor what failed or was asked wrongly. The jobs of an array differ by $SLURM_ARRAY_TASK_ID in their settings.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from blt_titan.commands.arguments import Parser, filled, output_file, whole, write_output
from blt_titan.commands.ending import command
from blt_titan.commands.run_settings import SHIPPED, add_config, parse_with_overrides, run_arguments
from blt_titan.config.check import RunConfigError, load_run_config

NAME = "blt-titan slurm"
TEMPLATE = Path(__file__).with_name("train.sbatch")
NUMBER = "$SLURM_ARRAY_TASK_ID"
"""What settings of an array's jobs may have in them."""
_PARTS = re.compile(f"({re.escape(NUMBER)})")
_MOST = 10**5


def make_parser() -> Parser:
    """Return what parses the command line, but for the overrides."""
    usage = f"{NAME} CONFIG --nodes N [options] [--section.key=value ...]"
    parser = Parser(NAME, __doc__, usage=usage, allow_abbrev=False)
    add_config(parser)
    job = parser.add_argument_group("the job").add_argument
    job("--nodes", type=whole(1, _MOST), required=True, metavar="N", help="nodes")
    job("--gpus-per-node", type=whole(1, 64), default=8, metavar="N", help="GPUs, and ranks, of a node (default 8)")
    job(
        "--leave-before",
        type=whole(1, 10**6),
        default=120,
        metavar="SECONDS",
        help="time before the end at which the run is told to leave: more than a save and three steps (default 120)",
    )
    job(
        "--max-restarts",
        type=whole(0, 10**6),
        default=3,
        metavar="N",
        help="failures without a new checkpoint between them after which ranks start again within the job (default 3)",
    )
    job("--array", type=_array, metavar="RANGE", help="numbers of jobs, as in 0-3, for a study (default: one job)")
    job(
        "--sbatch",
        type=_directive,
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="another option of sbatch, as in partition=gpu; may be repeated (default none)",
    )
    result = parser.add_argument_group("result").add_argument
    result("--out", type=output_file, metavar="FILE", help="write the script there instead of printing it")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `overrides` holds the settings that it changes."""
    return parse_with_overrides(make_parser(), arguments)


def _array(text: str) -> str:
    if not re.fullmatch(r"\d{1,6}(-\d{1,6}(:\d{1,6})?)?(,\d{1,6}(-\d{1,6})?)*(%\d{1,6})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers and ranges, as in 0-3 or 1,4,7%2")
    return text


def _directive(text: str) -> str:
    name, equals, value = filled(text).removeprefix("--").partition("=")
    if not equals or not re.fullmatch(r"[a-z][a-z-]{0,40}", name) or not value or re.search(r"[\n\r]", value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be OPTION=VALUE, as in partition=gpu")
    return f"{name}={value}"


def _quoted(word: str) -> str:
    """Quote for a shell all but the number of an array's job."""
    return "".join(f'"{part}"' if part == NUMBER else shlex.quote(part) for part in _PARTS.split(word) if part)


@command(NAME, RunConfigError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code."""
    args = parse_args(arguments)
    overrides: list[str] = args.overrides
    if NUMBER in " ".join(overrides) and not args.array:
        raise RunConfigError(f"{NUMBER} in a setting: only jobs of an --array have a number")
    # As the first job of an array has it: are these settings at all?
    load_run_config(run_arguments(args.config, [override.replace(NUMBER, "0") for override in overrides]))
    folders = [word.partition("=")[2] for word in overrides if word.startswith("--job.dump_folder=")]
    folder = folders[-1] if folders else load_run_config(run_arguments(args.config, [])).job.dump_folder
    for what, name in (("job.dump_folder", folder), ("CONFIG", str(args.config))):
        if len(name.splitlines()) > 1:
            raise RunConfigError(f"{what} = {name!r}: has a line end, which options of sbatch cannot have; rename it")
    script = batch_script(args, overrides, folder)
    if args.out is None:
        print(script, end="")
    else:
        write_output(args.out, script)
    print(f"{NAME}: before sbatch, which makes no folders: {_make_logs(args.array, folder)}", file=sys.stderr)
    return 0


def _make_logs(array: str | None, dump_folder: str) -> str:
    """Return the command that makes the folders of the logs.

    >>> _make_logs("0-7:2,9%1", "out/$SLURM_ARRAY_TASK_ID")
    'for SLURM_ARRAY_TASK_ID in {0..7..2} 9; do mkdir -p out/"$SLURM_ARRAY_TASK_ID"/slurm; done'
    """
    make = f"mkdir -p {_quoted(f'{dump_folder}/slurm')}"
    if array is None or NUMBER not in dump_folder:
        return make
    numbers = [
        re.sub(r"(\d+)-(\d+)(?::(\d+))?", lambda part: "{" + "..".join(filter(None, part.groups())) + "}", one)
        for one in array.partition("%")[0].split(",")
    ]
    return f"for SLURM_ARRAY_TASK_ID in {' '.join(numbers)}; do {make}; done"


def batch_script(args: argparse.Namespace, overrides: Sequence[str], dump_folder: str) -> str:
    """Return the script of a job."""
    name = args.config.stem
    config = name if args.config.parent == SHIPPED else str(args.config)
    logs = f"{dump_folder}/slurm/%A_%a.log" if args.array else f"{dump_folder}/slurm/%j.log"
    logs = logs.replace(NUMBER, "%a")
    directives = [
        f"job-name={name}",
        f"nodes={args.nodes}",
        "ntasks-per-node=1",
        f"gpus-per-node={args.gpus_per_node}",
        "requeue",
        f"signal=B:USR1@{args.leave_before}",
        f"output={logs}",
        "open-mode=append",
        *([f"array={args.array}"] if args.array else []),
        *args.sbatch,
    ]
    given = {directive.partition("=")[0] for directive in args.sbatch}
    kept = [line for line in directives[: -len(args.sbatch) or None] if line.partition("=")[0] not in given]
    filled_in = {
        "@DIRECTIVES@": "\n".join(f"#SBATCH --{line}" for line in [*kept, *args.sbatch]),
        "@NPROC@": str(args.gpus_per_node),
        "@RESTARTS@": str(args.max_restarts),
        "@COMMAND@": " ".join(map(_quoted, ["blt-titan", "train", config, *overrides])),
        "@MAKE_LOGS@": _make_logs(args.array, dump_folder),
        "@LOGS@": _quoted(f"{dump_folder}/slurm"),
    }
    script = TEMPLATE.read_text(encoding="utf-8")
    for mark, value in filled_in.items():
        script = script.replace(mark, value)
    return script


if __name__ == "__main__":
    sys.exit(main())
