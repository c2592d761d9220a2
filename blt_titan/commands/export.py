"""Write a training checkpoint as a Hugging Face directory: `AutoModelForCausalLM` and `AutoTokenizer` load it offline.

    blt-titan export --checkpoint outputs/blt_1b --entropy-checkpoint outputs/entropy_100m \
        --out blt-1b --dtype bf16

The checkpoint may be of any layout; one process on the CPU reads it a block at a time. With --verify what was written
is compared with the checkpoint, and the logits and patches of `transformers` (to be installed) with ours.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from blt_titan.checkpoint.json_fields import FieldError, number, read_fields, read_object
from blt_titan.commands.arguments import (
    NATS,
    SIZES,
    Parser,
    existing_directory,
    existing_file,
    output_directory,
    size_from,
    writing,
)
from blt_titan.commands.ending import command
from blt_titan.commands.model_options import add_import_option, import_first
from blt_titan.hf.export import MAX_SHARD_BYTES, export_hf, stored_weights, with_threshold
from blt_titan.hf.verify.verify import verify_export

NAME = "blt-titan export"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} --checkpoint CKPT --out DIR [options]", epilog=SIZES)
    _add_models(parser.add_argument_group("what to read"))
    _add_output(parser.add_argument_group("what to write"))
    _add_checks(parser.add_argument_group("what is compared and allowed"))
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint",
        type=existing_directory,
        required=True,
        metavar="CKPT",
        help="the BLT: a checkpoint step-N, or the folder of a run, whose last checkpoint is taken",
    )
    group.add_argument(
        "--entropy-checkpoint",
        type=existing_directory,
        metavar="CKPT",
        help="its entropy model, named likewise; it becomes the patcher (default: none, for rules without entropies)",
    )
    group.add_argument(
        "--threshold",
        type=NATS,
        metavar="NATS",
        help="entropy in nats above which a patch of the rule 'global' begins (default: what the checkpoint says)",
    )
    add_import_option(group.add_argument)


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=output_directory, required=True, metavar="DIR", help="the directory to write")
    group.add_argument(
        "--dtype", choices=list(DTYPES), default="fp32", help="number format of the weights (default %(default)s)"
    )
    group.add_argument(
        "--max-shard-size",
        type=size_from(1),
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="the most that a file of weights holds (default 5GB)",
    )
    group.add_argument(
        "--patch-lengths",
        type=existing_file,
        metavar="FILE",
        help="patch_lengths.json that `blt-titan calibrate --json` wrote: the model card shows it (default: none)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the model directory that is there")


def _add_checks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--verify",
        action="store_true",
        help="load what was written and compare it; needs transformers, and memory of 8 bytes per parameter and 4 more "
        "per element of the largest tensor",
    )
    group.add_argument(
        "--force", action="store_true", help="also write a model that needs explicit patch_lengths in transformers"
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, ValueError, ImportError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    if args.verify and find_spec("transformers") is None:
        raise ImportError("--verify needs transformers: pip install -c scripts/constraints.txt transformers")
    import_first(args)
    cut_share = _cut_share(args.patch_lengths) if args.patch_lengths else None
    blt = stored_weights(args.checkpoint)
    if args.threshold is not None:
        rule, entropies = with_threshold(blt.rule, blt.entropies, args.threshold, blt.origin)
        blt = replace(blt, rule=rule, entropies=entropies)
    entropy = stored_weights(args.entropy_checkpoint) if args.entropy_checkpoint else None
    with writing(args.out):
        out = export_hf(
            blt,
            args.out,
            entropy=entropy,
            dtype=DTYPES[args.dtype],
            max_shard_bytes=args.max_shard_size,
            cut_share=cut_share,
            force=args.force,
            overwrite=args.overwrite,
            progress=True,
        )
    print(f"{out}: written from {blt.origin}")
    if args.verify:
        print(f"{out}: verified: {verify_export(out, blt, entropy)}")
    return 0


def _cut_share(path: Path) -> float:
    """Read the share of patches that the limit cut, from what `blt-titan calibrate --json` wrote."""
    try:
        return read_fields(read_object(path), {"cut_share": number(0, 1)}, f"{path}: ")["cut_share"]
    except FieldError as error:
        raise ValueError(f"--patch-lengths {error}; name what `blt-titan calibrate --json` wrote") from error
