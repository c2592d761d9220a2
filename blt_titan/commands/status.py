"""Say how a run stands, live or dead: step, rate, time left, last checkpoint, last warning, and why it ended.

    blt-titan status outputs/debug
    watch -n 10 blt-titan status /shared/outputs/blt_8b

Reads what lies in the run's folder and asks the run nothing, so it works on any host that sees the folder. The run is
running, done, preempted (the same command goes on), refused, failed, or killed: its lock is free and it left no word.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from blt_titan.commands.arguments import Parser, existing_directory
from blt_titan.commands.ending import command
from blt_titan.monitor.status import StatusError, read_status, status_lines

NAME = "blt-titan status"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__)
    parser.add_argument("dump_folder", type=existing_directory, metavar="DUMP_FOLDER", help="the folder of the run")
    parser.add_argument("--json", action="store_true", help="print JSON; times are seconds since 1970")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, StatusError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0 whatever the run's state is, 2 if there is no run."""
    args = parse_args(arguments)
    status = read_status(args.dump_folder)
    if args.json:
        print(json.dumps(status.to_json(), indent=2))
    else:
        print(*status_lines(status), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
