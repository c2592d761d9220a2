"""Measure this code beside its peers, on this machine: times, memory, ratios.

    blt-titan bench train-step --repeats 5 --out train_step.json
    blt-titan bench train-step memory scaling patch-size --device cuda --dtype bfloat16 --shape 1B --work 1x24576
    blt-titan bench scoring generation data

Peers have processes of their own and make steps in turn; what is reported are medians. On a CPU the unit is processor
time, with one thread unless said otherwise, so that other work on the machine hardly counts; on a GPU it is the clock.

  train-step   a forward and a backward: ours without (eager) and with torch.compile (compiled), transformers with the
               same weights and patches, a token Llama of equal FLOPs a byte, the products with weights alone (floor)
  memory       the peak of such a step over what the process had before
  scaling      rows of 1 to 64 KiB
  patch-size   patches of 4.5, 6 and 8 bytes
  scoring      entropies in lanes, against one padded document at a time
  generation   cached, against transformers and against what weights, caches and FLOPs must take
  data         rows out of the loader

The first four take --work and --dtype, and generation --shape too.

Exit code 1 if something could not be measured; the rest is reported.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from blt_titan.bench.options import Options
from blt_titan.bench.peers import DTYPES
from blt_titan.bench.shapes import SHAPES
from blt_titan.bench.suites import SUITES, failures, run_suites, tables
from blt_titan.commands.arguments import SEED, Parser, whole, write_output
from blt_titan.commands.ending import command
from blt_titan.commands.model_options import add_result_options, device

NAME = "blt-titan bench"
MOST_ROWS, MOST_ROW_BYTES = 4096, 2**20
TINY_REPEATS = 2


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} SUITE [SUITE ...] [options]")
    parser.add_argument("suites", nargs="+", choices=list(SUITES), metavar="SUITE", help=f"one of {', '.join(SUITES)}")
    _add_what(parser.add_argument_group("what is measured"))
    _add_how(parser.add_argument_group("how it is measured"))
    add_result_options(parser.add_argument_group("results"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shape",
        choices=list(SHAPES),
        default="bench",
        help="shape of the model: a flavour, or `bench`: 20M, small hash tables (default %(default)s)",
    )
    group.add_argument(
        "--work",
        type=work,
        action="append",
        metavar="ROWSxBYTES",
        help="rows of a step and the bytes of each, as in 1x8192; may be repeated (default: those of the suite)",
    )
    group.add_argument(
        "--tiny",
        action="store_true",
        help=f"a model and rows of a test, {TINY_REPEATS} rounds: shows that everything works, and measures nothing",
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    group.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="number format of the computation; weights are float32 (default %(default)s)",
    )
    group.add_argument(
        "--threads", type=whole(1, 1024), default=1, metavar="N", help="threads of a process (default %(default)s)"
    )
    group.add_argument(
        "--repeats",
        type=whole(1, 1000),
        default=5,
        metavar="N",
        help="rounds that are measured, after one that is not; fewer than 5 are for a glance (default %(default)s)",
    )
    group.add_argument("--seed", type=SEED, default=0, help="seed of weights, bytes and patches (default %(default)s)")
    group.add_argument("--no-progress", action="store_true", help="show no progress bar")


def work(text: str) -> tuple[int, int]:
    """Read rows and bytes of a row.

    >>> work("2x1024")
    (2, 1024)
    """
    rows, _, row_bytes = text.partition("x")
    try:
        found = int(rows), int(row_bytes)
    except ValueError:
        found = 0, 0
    if not (1 <= found[0] <= MOST_ROWS and 32 <= found[1] <= MOST_ROW_BYTES):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be ROWSxBYTES, 1 to {MOST_ROWS:,} rows of 32 to {MOST_ROW_BYTES:,} bytes, as in 1x8192"
        )
    return found


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, ImportError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 1 if something could not be measured."""
    args = parse_args(arguments)
    options = Options(
        shape=args.shape,
        works=tuple(args.work or ()),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        repeats=TINY_REPEATS if args.tiny else args.repeats,
        seed=args.seed,
        tiny=args.tiny,
        progress=not args.no_progress,
    )
    asked = " ".join([NAME, *(sys.argv[2:] if arguments is None else arguments)])
    result = {}
    for result in run_suites(args.suites, options, asked):
        if args.out is not None:
            write_output(args.out, json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n\n".join(table.text() for table in tables(result)))
        print(f"\n{described(result)}")
    failed = failures(result)
    for sentence in failed:
        print(f"{NAME}: not measured: {sentence}", file=sys.stderr)
    return 1 if failed else 0


def described(result: dict) -> str:
    """Say in a line where a result was taken."""
    machine, versions = result["machine"], result["versions"]
    where = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    return f"{where}; {used}; commit {result['commit']}"
