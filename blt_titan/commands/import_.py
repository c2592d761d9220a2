"""Turn released weights into a training checkpoint that a run of any layout begins from.

    blt-titan import --model facebook/blt-1b --out checkpoints/blt-1b \
        --entropy-out checkpoints/blt-1b-entropy
    blt-titan train blt_1b --checkpoint.initial_load_path=checkpoints/blt-1b

The model may be in the layout of transformers or in that of the original project, in a directory or on the hub.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from blt_titan.checkpoint.write import require_free, write_checkpoint
from blt_titan.commands.arguments import Parser, filled, model, output_directory, writing
from blt_titan.commands.ending import command
from blt_titan.commands.model_options import add_import_option, import_first
from blt_titan.hf.pretrained import Pretrained, PretrainedBLT, PretrainedEntropyModel

NAME = "blt-titan import"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} --model DIR_OR_REPO [--out CKPT] [--entropy-out CKPT] [options]")
    add = parser.add_argument_group("what to read").add_argument
    add("--model", type=model, required=True, metavar="DIR_OR_REPO", help="a directory, or owner/name on the hub")
    add(
        "--revision",
        type=filled,
        help="branch, tag or commit of the repository on the hub (default: its main branch)",
    )
    add_import_option(add)
    add = parser.add_argument_group("what to write, one of them at least").add_argument
    add("--out", type=output_directory, metavar="CKPT", help="the checkpoint of the BLT to write")
    add("--entropy-out", type=output_directory, metavar="CKPT", help="the checkpoint of its entropy model to write")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    if not args.out and not args.entropy_out:
        raise ValueError("nothing to write: name --out, --entropy-out or both")
    if args.out and args.entropy_out and Path(args.out).resolve().is_relative_to(Path(args.entropy_out).resolve()):
        raise ValueError(f"--entropy-out {args.entropy_out}: must not be --out {args.out}, nor hold it")
    for out in filter(None, (args.out, args.entropy_out)):
        require_free(out)
    import_first(args)
    pretrained = Pretrained(args.model, revision=args.revision)
    rule = pretrained.rule
    # First, so that nothing is written if it is not the one that belongs to the BLT.
    entropy_model = PretrainedEntropyModel.from_pretrained(pretrained.directory) if args.entropy_out else None
    if args.out:
        blt = PretrainedBLT.from_pretrained(pretrained.directory)
        with writing(args.out):
            written = write_checkpoint(blt, "blt", blt.args, args.out, rule=rule, entropies=pretrained.entropies)
        print(f"{written}: the BLT")
        if rule is not None:
            settings = " ".join(f"--patching.{k}={v}" for k, v in rule.as_settings().items() if v is not None)
            if rule.by_entropy and rule.storage != "float16":
                settings += f" (entropies were rounded: blt-titan score --quantize {rule.storage})"
            print(f"train it with its own patches: {settings}")
    if entropy_model is not None:
        with writing(args.entropy_out):
            written = write_checkpoint(entropy_model, "blt_entropy", entropy_model.args, args.entropy_out)
        print(f"{written}: the entropy model")
    elif pretrained.has_entropy_model:
        print("its entropy model was left where it is; --entropy-out writes it too")
    return 0
