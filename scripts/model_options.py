"""The options of every command that runs a trained BLT."""

import argparse
from typing import Any

import torch

from blt_titan.interop.loading import Loaded, load_for_inference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what names the models, where their patches begin, and where they run."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|CKPT", help="a model directory, a checkpoint, or owner/name on the hub")
    add("--entropy-checkpoint", metavar="DIR|CKPT", help="the entropy model, where --model does not hold it")
    add("--threshold", type=float, metavar="NATS", help="where patches begin (default: as in training)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the BLT's computation (default %(default)s)")


def load_models(args: Any) -> Loaded:
    """Load what the options name; errors as `load_for_inference`."""
    return load_for_inference(
        args.model,
        entropy=args.entropy_checkpoint,
        threshold=args.threshold,
        device=args.device,
        dtype=DTYPES[args.dtype],
    )
