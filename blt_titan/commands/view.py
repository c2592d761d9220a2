r"""Show patches: one self-contained page of a text, its entropies, and where a threshold cuts it.

    blt-titan view --text "to be, or not to be" --checkpoint outputs/entropy_100m --out page.html
    blt-titan view --data data/web --doc 3 --threshold 1.33 --out page.html

With --data the entropies come from the sidecar that `blt-titan score` made; with --text the checkpoint's model
makes them. Each byte is coloured by its entropy, patches are boxed, and below is the entropy curve with the threshold;
a slider moves the threshold and draws the patches anew, in the browser.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from blt_titan.byte_vocab import BYTE_OFFSET, document_ids
from blt_titan.checkpoint.load import load_entropy_model
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.commands.arguments import (
    MOST_PATCH_BYTES,
    NATS,
    Parser,
    existing_directory,
    filled,
    output_file,
    plain,
    whole,
    write_output,
)
from blt_titan.commands.ending import command
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import EntropySidecar
from blt_titan.patching.rounding import from_storage, to_storage
from blt_titan.plots.patch_page import patch_page
from blt_titan.scoring.entropies import EntropyScorer

LONGEST_TEXT = 20_000

NAME = "blt-titan view"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} (--text TEXT --checkpoint CKPT | --data DIR) --out FILE [options]")
    _add_text(parser.add_argument_group("which text"))
    _add_patches(parser.add_argument_group("entropies and patches"))
    _add_page(parser.add_argument_group("the page"))
    return parser


def _add_text(group: argparse._ArgumentGroup) -> None:
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--text", type=filled, help="a text to score and show; needs --checkpoint")
    one.add_argument(
        "--data",
        type=existing_directory,
        metavar="DIR",
        help="byte shards with a sidecar of entropies; shows document --doc",
    )
    group.add_argument(
        "--doc",
        type=whole(0, 10**12),
        default=0,
        metavar="N",
        help="number of the document in the split, from 0 (default %(default)s)",
    )
    group.add_argument(
        "--split",
        choices=["train", "validation"],
        default="validation",
        help="which split of --data (default %(default)s)",
    )


def _add_patches(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--name", type=plain, default="default", help="name of the sidecar in --data (default %(default)s)"
    )
    group.add_argument(
        "--checkpoint",
        type=existing_directory,
        metavar="CKPT",
        help="the entropy model for --text: a checkpoint step-N, or the folder of a run (its last one)",
    )
    group.add_argument(
        "--threshold",
        type=NATS,
        default=1.335442066192627,
        metavar="NATS",
        help="entropy in nats above which a patch begins; the page's slider begins there (default %(default)s)",
    )
    group.add_argument(
        "--max-patch-bytes",
        type=whole(1, MOST_PATCH_BYTES),
        default=512,
        metavar="N",
        help="bytes of the longest patch; longer ones are split (default %(default)s)",
    )


def _add_page(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=output_file, required=True, metavar="FILE", help="the HTML file to write")
    group.add_argument(
        "--max-bytes",
        type=whole(1, LONGEST_TEXT),
        default=4000,
        metavar="N",
        help="bytes of the text that are shown (default %(default)s)",
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, DataError, CheckpointError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    if args.text is not None:
        if not args.checkpoint:
            raise DataError("--text needs --checkpoint, the entropy model that scores it")
        # What a shell passes need not be UTF-8.
        title, text = "text", args.text.encode(errors="surrogateescape")
        ids = document_ids(text)
        scored = EntropyScorer(load_entropy_model(args.checkpoint)).score(ids)[ids >= BYTE_OFFSET]
        entropies = from_storage(to_storage(scored, "float16"))
    else:
        if args.checkpoint:
            raise DataError(
                f"--checkpoint {args.checkpoint}: only with --text; the entropies of --data are those of the sidecar"
            )
        title, text, entropies = _document(args.data, args.split, args.name, args.doc)
    page = patch_page(
        text[: args.max_bytes],
        entropies[: args.max_bytes],
        title=title,
        threshold=args.threshold,
        max_patch_bytes=args.max_patch_bytes,
    )
    write_output(args.out, page)
    print(f"{args.out}: {min(len(text), args.max_bytes):,} of {len(text):,} bytes of {title}")
    return 0


def _document(data: str, split: str, name: str, number: int) -> tuple[str, bytes, np.ndarray]:
    shards = ShardSet(data, split)
    sidecar = EntropySidecar(data, name, shards)
    if not 0 <= number < shards.documents:
        raise DataError(f"--doc {number}: the {split} split of {data} has documents 0 to {shards.documents - 1}")
    for i in range(len(shards)):
        rows = shards.record_batch_info(i).rows
        if number < rows:
            batch = shards.read(i)
            begin, end = batch.offsets[number : number + 2].tolist()
            return batch.doc_ids[number], batch.document(number).tobytes(), sidecar(batch)[begin:end]
        number -= rows
    raise AssertionError("the index holds fewer documents than the manifest says")
