"""Print the settings that a run would have, as TOML, or check them.

    blt-titan config debug --training.steps=100 > my.toml
    blt-titan config my.toml --check --world-size 8

Precedence: command line, then CONFIG, then defaults. What it prints is a configuration of its own; settings that have
no value are left out, as TOML has none for them. --check looks at all that is looked at before a run: the keys, the
data, the checkpoint that it begins from; names each fault on a line; and says nothing on standard output.
"""

import argparse
import sys
from collections.abc import Sequence

import tomli_w

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.commands.arguments import Parser, whole
from blt_titan.commands.ending import command
from blt_titan.commands.run_settings import add_config, parse_with_overrides, run_arguments
from blt_titan.config.check import RunConfigError, check_run, load_run_config
from blt_titan.config.effective import effective_settings
from blt_titan.config.help import listing
from blt_titan.data.store.errors import DataError

NAME = "blt-titan config"


def make_parser() -> Parser:
    """Return what parses the command line, but for the overrides."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} [CONFIG] [options] [--section.key=value ...]", allow_abbrev=False)
    add_config(parser, nargs="?")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="check the settings instead of printing them")
    what.add_argument("--keys", action="store_true", help="list every key with its type, default, bounds and meaning")
    parser.add_argument(
        "--world-size",
        type=whole(1, 10**6),
        default=1,
        metavar="N",
        help="ranks of the whole job that --check is about (default %(default)s)",
    )
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `overrides` holds the settings that it changes."""
    return parse_with_overrides(make_parser(), arguments)


@command(NAME, RunConfigError, DataError, CheckpointError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 if the settings are refused."""
    args = parse_args(arguments)
    if args.keys:
        print(listing(), end="")
        return 0
    config = load_run_config(run_arguments(args.config, args.overrides))
    if not args.check:
        print(tomli_w.dumps(effective_settings(config)), end="")
        return 0
    check_run(config, world_size=args.world_size, verify_data=True)
    ranks = "1 rank" if args.world_size == 1 else f"{args.world_size} ranks"
    print(f"{NAME}: {args.config or 'the defaults'}: can be run on {ranks}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
