"""Train a model by a TOML of settings, on one process or many.

    blt-titan train debug
    blt-titan train my.toml --nproc 8 --training.steps=100 --optimizer.lr=1e-3
    blt-titan train blt_8b --nproc 8 --nnodes 8 --node-rank $RANK --master-addr host0      (on each node)

The settings are checked before a rank starts. Where RANK and WORLD_SIZE are set, as under torchrun, it is one rank of a
run that others started. The same command goes on from the last checkpoint in job.dump_folder.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.run import determine_local_world_size

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.commands import prepare
from blt_titan.commands.arguments import Parser, filled, whole
from blt_titan.commands.ending import command
from blt_titan.commands.launch import MEETING_S, Restarts, launch, tell_other_nodes
from blt_titan.commands.ranks import DEFAULT_PORT, Ranks
from blt_titan.commands.run_settings import SHIPPED, add_config, parse_with_overrides, run_arguments
from blt_titan.config.check import RunConfigError, check_run, load_run_config
from blt_titan.config.run_config import RunConfig
from blt_titan.data.store.errors import DataError
from blt_titan.scoring.online import online_model
from blt_titan.training.run_folder import RunFolderError, try_folder

NAME = "blt-titan train"
_MOST_RANKS = 10**6
_OF_RANKS = ("nproc", "nnodes", "node_rank", "master_addr", "master_port", "log_rank")
_EXAMPLE_DATA = "data/stdlib"
"""Where the shipped debug configurations find their data; it is made when it is missing."""
_MAKE_EXAMPLE_DATA = [
    *("--source", "python-stdlib", "--out", _EXAMPLE_DATA, "--validation-fraction", "0.05", "--seed", "0"),
    *("--max-bytes", "6MB", "--record-batch-bytes", "16KiB"),
]


def make_parser() -> Parser:
    """Return what parses the command line, but for the overrides."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} CONFIG [options] [--section.key=value ...]", allow_abbrev=False)
    add_config(parser)
    ranks = parser.add_argument_group("ranks, as torchrun counts them")
    add = ranks.add_argument
    add(
        "--nproc",
        type=number_of_ranks,
        metavar="N",
        help="ranks on this node: a number, or gpu, cpu or auto for as many as there are (default 1)",
    )
    add("--nnodes", type=whole(1, _MOST_RANKS), metavar="N", help="nodes (default 1)")
    add("--node-rank", type=whole(0, _MOST_RANKS - 1), metavar="N", help="number of this node (default 0)")
    add("--master-addr", type=filled, metavar="HOST", help="where node 0 is (default localhost)")
    add(
        "--master-port",
        type=whole(1, 65535),
        metavar="PORT",
        help=f"where node 0 listens (default {DEFAULT_PORT}; with one node any free port)",
    )
    add("--log-rank", type=rank_list, metavar="N,...", help="ranks of this node that print (default 0)")
    failures = parser.add_argument_group("when nodes are late, and when ranks fail").add_argument
    failures(
        "--rendezvous-timeout",
        type=whole(1, 10**6),
        metavar="SECONDS",
        help=f"time in which the launchers of all nodes must be there; who is missing is named (default {MEETING_S:g})",
    )
    failures(
        "--max-restarts",
        type=whole(0, 10**6),
        metavar="N",
        help="failures without a new checkpoint between them after which ranks are started again, on all nodes what "
        "node 0 says (default 0)",
    )
    parser.add_argument_group(
        "settings", "--section.key=value, after CONFIG; `blt-titan config --keys` lists every key with what it means"
    )
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `overrides` holds the settings that it changes."""
    return parse_with_overrides(make_parser(), arguments)


@command(
    NAME,
    *(RunConfigError, RunFolderError, DataError, CheckpointError),
    stopped="stopped; the same command goes on from the last checkpoint",
)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: that of the first rank that failed, or 2 if the settings are refused."""
    args = parse_args(arguments)
    of_run = run_arguments(args.config, args.overrides)
    asked = {
        key: value
        for key in (*_OF_RANKS, "rendezvous_timeout", "max_restarts")
        if (value := getattr(args, key)) is not None
    }
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not asked:
        return _be_a_rank(of_run)
    if "TORCHELASTIC_RUN_ID" in os.environ and asked:
        option = next(iter(asked)).replace("_", "-")
        raise RunConfigError(f"--{option} within torchrun, which has started the ranks: leave it out")
    meeting_s, most = asked.pop("rendezvous_timeout", MEETING_S), asked.pop("max_restarts", 0)
    ranks = Ranks(nproc=asked.pop("nproc", 1), **asked)
    if ranks.node_rank >= ranks.nnodes:
        raise RunConfigError(f"--node-rank {ranks.node_rank}: must be below --nnodes {ranks.nnodes}, the first is 0")
    try:
        config = load_run_config(of_run)
        if made := _make_example_data(args.config, config):
            return made
        check_run(config, world_size=ranks.world_size, verify_data=True)
        online_model.cache_clear()  # this process only waits for the ranks, which load their own
        # On the node of rank 0, before ranks start: whether the folder can be had.
        if ranks.node_rank == 0:
            try_folder(config.job.dump_folder)
    except (RunConfigError, RunFolderError, DataError, CheckpointError) as error:
        tell_other_nodes(ranks, " ".join(str(error).split()), meeting_s)
        raise
    folder = Path(config.job.dump_folder)
    restarts = Restarts(most, folder / config.checkpoint.folder if config.checkpoint.enable else None)
    return launch(NAME, ranks, of_run, restarts=restarts, meeting_s=meeting_s, log_folder=folder / "logs")


def _be_a_rank(arguments: list[str]) -> int:
    from blt_titan.train import main as train

    sys.argv[1:] = arguments
    train()
    return 0


def _make_example_data(config_file: Path, config: RunConfig) -> int:
    """Make the data of a shipped debug configuration where it is missing; return an exit code, 0 if all is well."""
    is_shipped = config_file.resolve().parent == SHIPPED.resolve() and config_file.stem.endswith("debug")
    if not is_shipped or config.training.dataset_path != _EXAMPLE_DATA or Path(_EXAMPLE_DATA).exists():
        return 0
    print(f"{NAME}: {_EXAMPLE_DATA} is missing: making it from Python's standard library", file=sys.stderr)
    return prepare.main(_MAKE_EXAMPLE_DATA)


def number_of_ranks(text: str) -> int:
    """Read how many ranks a node has, as torchrun does."""
    if text in ("gpu", "cpu", "auto"):
        try:
            return determine_local_world_size(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: this machine has no GPU that torch can use") from None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:10]) <= _MOST_RANKS):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a whole number from 1 to {_MOST_RANKS:,}, or gpu, cpu or auto"
        )
    return int(text)


def rank_list(text: str) -> str:
    """Read a list of ranks of this node."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers of ranks separated by commas, as in 0,1")
    return text


if __name__ == "__main__":
    sys.exit(main())
