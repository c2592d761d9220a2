"""Check what a run does on CUDA, on a machine without a GPU: one step of its own code on tensors without data.

    blt-titan check-cuda --config blt_1b --world-size 8
    blt-titan check-cuda --config my.toml --world-size 64 --gpu h200 --training.local_batch_size=2 --memory-only

Prints the peak memory of a rank by phase and by kind of tensor, host reads, graph breaks and recompilations, registers,
spills and shared memory of each compiled kernel, and an estimate of the time. Needs a CUDA build of torch, in a venv of
its own of about 6 GB, and no GPU. Exit code 1 if the step would wait for the device, compile again, spill or not fit.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from blt_titan.commands.arguments import Parser, whole
from blt_titan.commands.ending import command
from blt_titan.commands.run_settings import config_file, parse_with_overrides, run_arguments, shipped_configs
from blt_titan.config.check import RunConfigError, load_run_config
from blt_titan.dry_run.cards import CARDS
from blt_titan.dry_run.errors import DryRunError
from blt_titan.dry_run.report import report
from blt_titan.dry_run.run import check_cuda_build, dry_run

NAME = "blt-titan check-cuda"


def make_parser() -> Parser:
    """Return what parses the command line, but for the overrides."""
    usage = f"{NAME} --config CONFIG --world-size N [options] [--section.key=value ...]"
    parser = Parser(NAME, __doc__, usage=usage, allow_abbrev=False)
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--config",
        type=config_file,
        required=True,
        metavar="CONFIG",
        help=f"the run's TOML: a file, or a shipped one by name ({', '.join(shipped_configs())})",
    )
    what.add_argument(
        "--world-size", type=whole(1, 10**6), required=True, metavar="N", help="ranks of the whole job; one is run"
    )
    what.add_argument(
        "--rank",
        type=whole(0, 10**6),
        metavar="N",
        help="the one that is run (default: amid those that share the first row)",
    )
    what.add_argument("--gpu", choices=sorted(CARDS), default="h100", help="card to compile for (default %(default)s)")
    how = parser.add_argument_group("how it is told")
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--memory-only", action="store_true", help="generate no kernels: much quicker, and no times")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `overrides` holds the settings that it changes."""
    return parse_with_overrides(make_parser(), arguments)


@command(NAME, RunConfigError, DryRunError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0 sound, 1 not sound, 2 asked wrongly or not possible here."""
    args = parse_args(arguments)
    if args.rank is not None and args.rank >= args.world_size:
        raise DryRunError(f"--rank {args.rank}: there are {args.world_size} ranks, from 0")
    check_cuda_build()
    config = load_run_config(run_arguments(args.config, args.overrides))
    found = dry_run(
        config,
        args.world_size,
        args.gpu,
        name=" ".join([args.config.stem, *args.overrides]),
        kernels=not args.memory_only,
        rank=args.rank,
    )
    faults = found.faults()
    print(json.dumps(found.to_json() | {"faults": faults}, indent=2) if args.json else report(found))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
