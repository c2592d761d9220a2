"""The options of every command that runs a trained BLT."""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch

from blt_titan.commands.arguments import NATS, filled, model, module_name, output_file
from blt_titan.custom_import import CustomImportError, import_custom
from blt_titan.evaluation.noise import NOISES
from blt_titan.hf.load import Loaded, load_for_inference
from blt_titan.hf.pretrained import Pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what names the models, where their patches begin, and where they run."""
    add = parser.add_argument_group("the model").add_argument
    add(
        "--model",
        type=model,
        required=True,
        metavar="DIR|CKPT",
        help="a model directory, a checkpoint (step-N, or the folder of a run: its last one), or owner/name on the hub",
    )
    add(
        "--entropy-checkpoint",
        type=model,
        metavar="DIR|CKPT",
        help="the entropy model, where --model does not hold it (default: that of --model, if its patches need one)",
    )
    add(
        "--threshold",
        type=NATS,
        metavar="NATS",
        help="entropy in nats above which a patch begins (default: as in training)",
    )
    add_import_option(add)
    where = parser.add_argument_group("where it is computed")
    add_device_option(where)
    where.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="number format of the BLT's computation; entropies are computed in float32 (default %(default)s)",
    )


def add_import_option(add: Callable[..., Any]) -> None:
    """Add what names a module of the user's that is imported first."""
    add(
        "--import",
        dest="custom_import",
        type=module_name,
        metavar="MODULE",
        help="a Python module of yours that registers the model's patching rule, found from here (default: none)",
    )


def import_first(args: Any) -> None:
    """Import what `--import` names.

    Raises:
        ValueError: it cannot be imported.
    """
    if args.custom_import is not None:
        try:
            import_custom(args.custom_import)
        except CustomImportError as error:
            raise ValueError(f"--import {error}") from error


def add_noise_option(group: argparse._ArgumentGroup) -> None:
    """Add how texts are changed before they are scored."""
    group.add_argument(
        "--noise",
        choices=NOISES,
        help="change the texts before, as the paper does to test robustness (default: no noise)",
    )


def add_result_options(group: argparse._ArgumentGroup) -> None:
    """Add where figures go beside the table on standard output, and instead of it."""
    group.add_argument("--out", type=output_file, metavar="FILE", help="also write the figures as JSON")
    group.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")


def add_device_option(group: argparse._ArgumentGroup) -> None:
    """Add where a model runs."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=device, default=default, help="cpu, cuda or cuda:N (default %(default)s)")


def device(text: str) -> str:
    """Refuse a device that is not here, without touching one that is."""
    try:
        found = torch.device(filled(text))
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: no such device; it may be cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: this machine has {torch.cuda.device_count()} CUDA devices")
    return text


def prepare_models(args: Any) -> None:
    """Do what comes before loading: import the user's module, and fetch an entropy model that is not on this machine.

    Fetched first because it may be missing on the hub too.

    Raises:
        ValueError: the module cannot be imported.
    """
    import_first(args)
    if args.entropy_checkpoint and not os.path.isdir(args.entropy_checkpoint):
        Pretrained(args.entropy_checkpoint)


def load_models(args: Any) -> Loaded:
    """Load what the options name; errors as `load_for_inference`."""
    prepare_models(args)
    return load_for_inference(
        args.model,
        entropy=args.entropy_checkpoint,
        threshold=args.threshold,
        device=args.device,
        dtype=DTYPES[args.dtype],
    )
