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
from blt_titan.checkpoint.description import CheckpointError, load_entropy_model
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


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser("blt-titan view", __doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=filled, help="a text to score and show; needs --checkpoint")
    what.add_argument(
        "--data",
        type=existing_directory,
        metavar="DIR",
        help="byte shards with a sidecar of entropies; shows document --doc",
    )
    add(
        "--doc",
        type=whole(0, 10**12),
        default=0,
        metavar="N",
        help="number of the document in the split (default %(default)s)",
    )
    add("--split", choices=["train", "validation"], default="validation", help="default %(default)s")
    add("--name", type=plain, default="default", help="of the sidecar (default %(default)s)")
    add(
        "--checkpoint",
        type=existing_directory,
        metavar="CKPT",
        help="the entropy model: step-N, or the folder of a run",
    )
    add("--threshold", type=NATS, default=1.335442066192627, metavar="NATS", help="to begin with (default %(default)s)")
    add(
        "--max-patch-bytes",
        type=whole(1, MOST_PATCH_BYTES),
        default=512,
        metavar="N",
        help="longer ones are split (default %(default)s)",
    )
    add(
        "--max-bytes",
        type=whole(1, LONGEST_TEXT),
        default=4000,
        metavar="N",
        help="of the text that are shown (default %(default)s)",
    )
    add("--out", type=output_file, required=True, metavar="FILE", help="the page to write")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command("blt-titan view", DataError, CheckpointError)
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
