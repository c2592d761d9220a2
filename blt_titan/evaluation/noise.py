"""Texts with noise, as the paper tests robustness: what a reader still reads and a tokenizer stumbles over.

antspeak    every character a capital, with spaces between      T H I S
drop        a tenth of the characters left out
random_case half of the characters capitals, half small         tHiS
repeat      a fifth of the characters up to four times          thhhis
uppercase   THIS
"""

from collections.abc import Callable

import numpy as np

NOISES = ("antspeak", "drop", "random_case", "repeat", "uppercase")
NOISE_ON = ("prompt", "completion", "both")
"""Which texts of a task; the paper averages over its results with each."""
DROPPED, CAPITALS, REPEATED, MOST_TIMES = 0.1, 0.5, 0.2, 4


def add_noise(text: bytes, noise: str, *, seed: int) -> bytes:
    """Return a text with noise; bytes that are not UTF-8 count as characters and stay.

    >>> add_noise("straße".encode(), "antspeak", seed=0).decode()
    'S T R A S S E'

    Args:
        text: of a document.
        noise: one of NOISES.
        seed: of what is drawn.

    Raises:
        ValueError: there is no such noise.
    """
    change = _CHANGES.get(noise)
    if change is None:
        raise ValueError(f"noise {noise!r}: must be one of {', '.join(NOISES)}")
    changed = change(text.decode(errors="surrogateescape"), np.random.default_rng(seed))
    return changed.encode(errors="surrogateescape")


def _drop(text: str, rng: np.random.Generator) -> str:
    return "".join(c for c, kept in zip(text, rng.random(len(text)) >= DROPPED, strict=True) if kept)


def _random_case(text: str, rng: np.random.Generator) -> str:
    return "".join(
        c.upper() if capital else c.lower() for c, capital in zip(text, rng.random(len(text)) < CAPITALS, strict=True)
    )


def _repeat(text: str, rng: np.random.Generator) -> str:
    times = np.where(rng.random(len(text)) < REPEATED, rng.integers(2, MOST_TIMES + 1, len(text)), 1)
    return "".join(c * n for c, n in zip(text, times.tolist(), strict=True))


_CHANGES: dict[str, Callable[[str, np.random.Generator], str]] = {
    "antspeak": lambda text, rng: " ".join(text.upper()),
    "drop": _drop,
    "random_case": _random_case,
    "repeat": _repeat,
    "uppercase": lambda text, rng: text.upper(),
}
