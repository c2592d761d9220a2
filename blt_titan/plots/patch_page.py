"""A page that shows where patches begin: bytes coloured by entropy, boxes, a curve, a slider for the threshold.

One HTML file (`patch_page.html`, filled in) without anything from outside: it opens from a disk, and can be sent to
someone. The browser cuts patches by the `global` rule of `patching/entropy.py`, as it is written there: positions 0 and
1 start one, then wherever the entropy after the byte before is above the threshold, and where a patch is full.
"""

import html
import json
from pathlib import Path

import numpy as np


def patch_page(
    text: bytes, entropies_nats: np.ndarray, *, title: str, threshold: float, max_patch_bytes: int = 512
) -> str:
    """Return the page of one document.

    Args:
        text: its bytes, N of them, without BOS.
        entropies_nats: H after each byte, float [N].
        title: shown above.
        threshold: nats, where the slider begins.
        max_patch_bytes: longer patches are split.
    """
    assert len(text) == len(entropies_nats)
    data = {
        "bytes": list(text),
        "shown": _shown(text),
        "entropies": [round(float(h), 5) for h in entropies_nats],
        "threshold": threshold,
        "maxPatchBytes": max_patch_bytes,
    }
    # Nothing of the text can end the script element.
    script = json.dumps(data).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("@TITLE@", html.escape(title)).replace("@DATA@", script)


def _shown(text: bytes) -> list[str]:
    """Return what stands for each byte: its character, on the first of its bytes; a dot for what cannot be seen."""
    shown = []
    characters = text.decode(errors="surrogateescape")
    for character in characters:
        encoded = character.encode(errors="surrogateescape")
        if "\udc80" <= character <= "\udcff":
            shown.append(f"\\x{encoded[0]:02x}")
        elif character == "\n":
            shown.append("⏎")
        elif character == " ":
            shown.append("␣")
        elif character == "\t":
            shown.append("⇥")
        else:
            shown.append(character if character.isprintable() else f"\\x{encoded[0]:02x}")
        shown += ["·"] * (len(encoded) - 1)
    return shown
