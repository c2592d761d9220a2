"""Plan a run on so many GPUs before any of them is there: memory, traffic, time, money, how often to save.

    blt-titan plan --config blt_8b --world-size 64
    blt-titan plan --config blt_8b --world-size 256 --price 2.5 --mfu 0.38 --parallelism.tensor_parallel_degree=2
    blt-titan plan --config my.toml --world-size 128 --search

Memory and traffic are those of the run's own code, one step of it on tensors without data; times and money follow by
arithmetic, from data sheets and the shares of them that are assumed, which are printed. Exit code 1 if the run would
not fit; with --search, if no layout was found that does.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from blt_titan.commands.arguments import Parser, number, whole
from blt_titan.commands.assumptions import add_gpu, add_mfu, add_storage_and_failures, of_storage_and_failures
from blt_titan.commands.ending import command
from blt_titan.commands.run_settings import config_file, parse_with_overrides, run_arguments, shipped_configs
from blt_titan.config.check import RunConfigError, load_run_config
from blt_titan.dry_run.errors import DryRunError
from blt_titan.plan.network import NETWORKS
from blt_titan.plan.plan import Assumptions, make_plan
from blt_titan.plan.report import report, searched_report
from blt_titan.plan.search import search

NAME = "blt-titan plan"


def make_parser() -> Parser:
    """Return what parses the command line, but for the overrides."""
    usage = f"{NAME} --config CONFIG --world-size N [options] [--section.key=value ...]"
    parser = Parser(NAME, __doc__, usage=usage, allow_abbrev=False)
    what = parser.add_argument_group("what is planned")
    what.add_argument(
        "--config",
        type=config_file,
        required=True,
        metavar="CONFIG",
        help=f"the run's TOML: a file, or a shipped one by name ({', '.join(shipped_configs())})",
    )
    what.add_argument("--world-size", type=whole(1, 10**6), required=True, metavar="N", help="GPUs of the whole job")
    what.add_argument("--search", action="store_true", help="look for the layouts that fit and would be fastest")
    what.add_argument(
        "--tries", type=whole(1, 1000), default=8, metavar="N", help="splits that --search runs (default 8)"
    )
    assumed = parser.add_argument_group("what is assumed")
    add = assumed.add_argument
    add_gpu(assumed)
    add("--network", choices=list(NETWORKS), default="ib400", help="what connects them (default %(default)s)")
    of_mfu = assumed.add_mutually_exclusive_group()
    add_mfu(of_mfu)
    of_mfu.add_argument(
        "--estimate-mfu",
        action="store_true",
        help="take that of the roofline: kernels are compiled, which takes minutes and a CUDA build of torch",
    )
    add("--price", type=number(0, 1e6), metavar="MONEY", help="price of a GPU for an hour (default: no money is said)")
    add_storage_and_failures(assumed)
    how = parser.add_argument_group("how it is told")
    how.add_argument("--json", action="store_true", help="print JSON")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `overrides` holds the settings that it changes."""
    return parse_with_overrides(make_parser(), arguments)


@command(NAME, RunConfigError, DryRunError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0 fits, 1 does not, 2 asked wrongly or not possible here."""
    args = parse_args(arguments)
    assumptions = Assumptions(
        gpu=args.gpu,
        network=NETWORKS[args.network],
        mfu=None if args.estimate_mfu else args.mfu,
        price=args.price,
        **of_storage_and_failures(args),
    )
    name = " ".join([args.config.stem, *args.overrides])

    def read(overrides: Sequence[str]):
        return load_run_config(run_arguments(args.config, [*args.overrides, *overrides]))

    if args.search:
        found = search(read, args.world_size, assumptions, name=name, tries=args.tries, say=_say)
        best = [asdict(one)["overrides"] for one in found.best]
        plans = [{"overrides": words, "plan": one.plan.to_json()} for words, one in zip(best, found.best, strict=True)]
        shown = {"best": plans, "tried": found.tried, "left_out": found.left_out, "said": found.said}
        print(json.dumps(shown, indent=2) if args.json else searched_report(found))
        return 0 if found.best else 1
    plan = make_plan(read([]), args.world_size, assumptions, name=name)
    print(json.dumps(plan.to_json(), indent=2) if args.json else report(plan))
    return 0 if plan.fits else 1


def _say(line: str) -> None:
    print(f"plan: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
