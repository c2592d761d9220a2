"""Score byte shards with a trained entropy model: a sidecar of entropies beside them, of which a run makes patches.

    blt-titan score --data data/web --checkpoint outputs/entropy_100m

On several GPUs, or several nodes that see the same directory, a shard at a time:

    torchrun --nproc_per_node 8 -m blt_titan score --data data/web --checkpoint outputs/entropy_100m

Stopped and started again, it goes on with the shards that are not done.
"""

import argparse
import os
import time
from collections.abc import Sequence

import numpy as np
import torch

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET
from blt_titan.checkpoint.load import load_entropy_model
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.commands.arguments import BATCH, Parser, existing_directory, plain, whole, writing
from blt_titan.commands.ending import command
from blt_titan.commands.model_options import add_device_option
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import read_manifest
from blt_titan.scoring.calibration import quantization_disagreement
from blt_titan.scoring.entropies import CHUNK, LANES, EntropyScorer
from blt_titan.scoring.score_data import score_data, sidecar_settings

SAMPLE_BYTES = 4_000_000

NAME = "blt-titan score"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} --data DIR --checkpoint CKPT [options]")
    _add_inputs(parser.add_argument_group("what is scored, and by what"))
    _add_sidecar(parser.add_argument_group("the sidecar that is written"))
    _add_computation(parser.add_argument_group("how it is computed"))
    return parser


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=existing_directory,
        required=True,
        metavar="DIR",
        help="byte shards, as `blt-titan prepare` makes them",
    )
    group.add_argument(
        "--checkpoint",
        type=existing_directory,
        required=True,
        metavar="CKPT",
        help="the entropy model: a checkpoint step-N, or the folder of a run, whose last checkpoint is taken",
    )


def _add_sidecar(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--name", type=plain, default="default", help="name of the sidecar, in DIR/entropies (default %(default)s)"
    )
    group.add_argument(
        "--quantize",
        choices=["float16", "uint8"],
        default="float16",
        help="what is stored for a byte of text: 2 bytes, or 1 on a log scale of 255 steps (default %(default)s)",
    )
    group.add_argument(
        "--verify", action="store_true", help="check every byte of finished shards, and score damaged ones again"
    )


def _add_computation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="number format that the model computes in; recorded in the sidecar (default %(default)s)",
    )
    add_device_option(group)
    group.add_argument(
        "--lanes",
        type=BATCH,
        default=LANES,
        metavar="N",
        help="documents scored at once (default %(default)s)",
    )
    group.add_argument(
        "--chunk-bytes",
        type=whole(1, 2**20),
        default=CHUNK,
        metavar="N",
        help="bytes of a document in one forward pass (default %(default)s)",
    )
    group.add_argument("--no-progress", action="store_true", help="show no progress bar")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, DataError, CheckpointError, stopped="stopped; the same command goes on from here")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    read_manifest(args.data)  # before the model: it may be gone, or not be a data set
    model = load_entropy_model(args.checkpoint, device=_device(args.device))
    settings = sidecar_settings(model, args.quantize, args.dtype)
    scorer = EntropyScorer(model.to(getattr(torch, args.dtype)), lanes=args.lanes, chunk=args.chunk_bytes)
    began = time.perf_counter()
    sampled = _Sampled()
    where = f"{args.data}/entropies/{args.name}"
    with writing(where):
        summary = score_data(
            args.data,
            args.name,
            scorer,
            settings,
            rank=rank,
            ranks=ranks,
            verify=args.verify,
            observe=sampled.add if rank == 0 and args.quantize == "uint8" else None,
            progress=rank == 0 and not args.no_progress,
        )
    seconds = time.perf_counter() - began
    if summary.shards:
        padding = 1 - summary.text_bytes / summary.byte_slots
        print(
            f"{where}: {summary.text_bytes:,} bytes of {summary.shards} shards in {seconds:.1f} s, "
            f"{summary.text_bytes / seconds:,.0f} bytes/s, {padding:.1%} of the slots were not text"
        )
    sampled.report()
    print(f"{where}: " + ("complete" if summary.complete else "other ranks are still scoring"))
    return 0


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


class _Sampled:
    """The first entropies of a run, unrounded, to say what uint8 codes change."""

    def __init__(self):
        self._ids: list[np.ndarray] = []
        self._entropies: list[np.ndarray] = []
        self._held = 0

    def add(self, ids: np.ndarray, entropies_nats: np.ndarray) -> None:
        if self._held < SAMPLE_BYTES:
            self._ids.append(ids)
            self._entropies.append(np.where(ids >= BYTE_OFFSET, entropies_nats, 0).astype(np.float32))
            self._held += len(ids)

    def report(self) -> None:
        if not self._held:
            return
        begins = np.concatenate(self._ids) == BOS_ID
        print(f"boundaries of uint8 codes that are not those of float16, rule global, in {self._held:,} bytes:")
        for found in quantization_disagreement(np.concatenate(self._entropies), begins):
            print(
                f"  patches of {found.target_patch_bytes:g} bytes: {found.share:.2%} (threshold "
                f"{found.uint8_threshold:.4f} instead of {found.float16_threshold:.4f} nats)"
            )
