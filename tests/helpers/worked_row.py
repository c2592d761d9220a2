"""The worked row of docs/batch.md, computed by the code that it explains.

python -m tests.helpers.worked_row --write    # put it into the page
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from blt_titan.batch import IGNORE_LABEL
from blt_titan.data.rows.packing import RowShape, pack_row
from blt_titan.data.rows.patcher import patch_documents
from blt_titan.patching.rule import PatchRule
from tests.helpers.whole_rows import laid_out

PAGE = Path(__file__).parents[2] / "docs" / "batch.md"
BEGIN, END = "<!-- worked row: python -m tests.helpers.worked_row --write -->", "<!-- end of worked row -->"
TEXTS = (b"The cat sat.", b"Ok!")
SHAPE = RowShape(segments=2, segment_bytes=12, segment_patches=5)
SPECIAL = {0: ".", 1: "BOS", 2: "EOS"}


def shown(token_id: int) -> str:
    """A token as the page shows it: the character, `_` for a space."""
    return SPECIAL.get(token_id) or chr(token_id - 4).replace(" ", "_")


def worked_row() -> str:
    """The row as a block of Markdown."""
    text = np.frombuffer(b"".join(TEXTS), np.uint8)
    offsets = np.cumsum([0, *map(len, TEXTS)])
    patched = patch_documents(text, offsets, PatchRule("space", max_patch_bytes=12))
    row = laid_out(pack_row(patched, SHAPE), SHAPE)
    cuts = patched.cuts
    patches = " | ".join(" ".join(shown(int(i)) for i in patched.ids[a:b]) for a, b in pairwise(cuts))
    labels = ["-" if label == IGNORE_LABEL else shown(int(label)) for label in row.labels]
    lines = [
        f"{'slot':13}" + "".join(f"{slot:>4}" for slot in range(SHAPE.n_bytes)),
        f"{'ids':13}" + "".join(f"{shown(int(i)):>4}" for i in row.token_ids),
        f"{'labels':13}" + "".join(f"{label:>4}" for label in labels),
    ]
    for name in ("byte_pos", "byte_doc", "byte_patch", "source_patch", "patch_pos", "patch_doc"):
        values = getattr(row, name).tolist()
        lines.append(f"{name:13}" + "".join(f"{value:>4}" for value in values))
    return "```\npatches      " + patches + "\n\n" + "\n".join(lines) + "\n```"


def with_worked_row(page: str) -> str:
    """The page with the row of today between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{worked_row()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--write" in sys.argv:
        PAGE.write_text(with_worked_row(PAGE.read_text()))
    else:
        print(worked_row())
