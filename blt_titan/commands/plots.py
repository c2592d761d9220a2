"""Show what runs left behind on a page of this machine: curves, patch lengths, patches, scaling over several runs.

    blt-titan plots --dir outputs        # then open http://127.0.0.1:8000

Needs the extra `plots` (starlette and uvicorn). Only files inside the folder are shown, and only to this machine.
"""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from blt_titan.commands.arguments import Parser, existing_directory, whole
from blt_titan.commands.ending import command


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser("blt-titan plots", __doc__)
    parser.add_argument(
        "--dir", type=existing_directory, default="outputs", help="the folder of runs (default %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=whole(0, 65_535),
        default=8000,
        help="port of 127.0.0.1 that the page is served at; 0 takes a free one (default %(default)s)",
    )
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command("blt-titan plots")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command until Ctrl-C; give its exit code: 130 then, or 2 after an error."""
    args = parse_args(arguments)
    try:
        import uvicorn

        from blt_titan.plots.app import make_app
    except ImportError as error:
        print(f"blt-titan plots: error: {error}; pip install 'blt_titan[plots]'", file=sys.stderr)
        return 2
    app = make_app(Path(args.dir))
    try:
        # To this machine alone: what is shown was not written for others.
        listening = socket.create_server(("127.0.0.1", args.port))
    except OSError as error:
        print(f"blt-titan plots: error: --port {args.port}: {error}", file=sys.stderr)
        return 2
    print(f"http://127.0.0.1:{listening.getsockname()[1]}    (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    return 0
