"""Options by which one says what a plan or a simulation assumes of cards, storage and failures."""

import argparse
from typing import Any

from blt_titan.commands.arguments import number
from blt_titan.dry_run.cards import CARDS
from blt_titan.plan.plan import ASSUMED_MFU
from blt_titan.plan.reliability import GPU_FAILURES_PER_HOUR


def add_gpu(group: Any) -> None:
    """Let one choose the card."""
    group.add_argument("--gpu", choices=sorted(CARDS), default="h100", help="card (default %(default)s)")


def add_mfu(group: Any) -> None:
    """Let one say how well a card is used."""
    group.add_argument(
        "--mfu",
        type=number(0, 1, above_least=True),
        default=ASSUMED_MFU,
        metavar="SHARE",
        help=f"share of the card's dense bf16 FLOP/s that computing reaches (default {ASSUMED_MFU:g})",
    )


def add_storage_and_failures(group: Any) -> None:
    """Let one say how fast a node saves, how often a GPU fails, and how long it is until it goes on."""
    add = group.add_argument
    add(
        "--store",
        type=number(0, 1e6, above_least=True),
        default=2.0,
        metavar="GB/s",
        help="rate at which a node stores checkpoints (default 2)",
    )
    add(
        "--failures",
        type=number(0, 1e3),
        default=GPU_FAILURES_PER_HOUR,
        metavar="RATE",
        help=f"failures of a GPU and its share of the rest in an hour (default {GPU_FAILURES_PER_HOUR:.2g}: Llama 3)",
    )
    add(
        "--restart",
        type=number(0, 1e6),
        default=300.0,
        metavar="SECONDS",
        help="time from a failure to the next step (default 300)",
    )


def of_storage_and_failures(args: argparse.Namespace) -> dict[str, float]:
    """Return those fields of `Assumptions`, in its units."""
    return {
        "store_bytes_per_s": args.store * 1e9,
        "failures_per_gpu_hour": args.failures,
        "restart_s": args.restart,
    }
