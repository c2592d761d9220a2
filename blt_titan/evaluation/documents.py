"""Bits per byte over documents, by source, with confidence intervals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blt_titan.byte_vocab import document_ids
from blt_titan.data.prepare.documents import SourcedDocument
from blt_titan.evaluation.noise import add_noise
from blt_titan.inference.likelihood import LikelihoodScorer
from blt_titan.loss import bits_per_byte

CONFIDENCE = 0.95
_RESAMPLINGS = 1000


@dataclass
class DocumentScores:
    """What the documents of a source were found to be."""

    byte_nats: list[float] = field(default_factory=list)
    eos_nats: list[float] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)

    def add(self, byte_nats: float, eos_nats: float, n_bytes: int, patches: int) -> None:
        """Append a document."""
        self.byte_nats.append(byte_nats)
        self.eos_nats.append(eos_nats)
        self.n_bytes.append(n_bytes)
        self.patches.append(patches)

    def summary(self) -> dict[str, Any]:
        """Return the figures; the interval, None for one document, is of documents drawn anew, a thousand times."""
        nats, sizes = np.array(self.byte_nats), np.array(self.n_bytes)
        # One document says nothing about others.
        interval = list(bootstrap_interval(nats, sizes)) if len(sizes) > 1 else None
        return {
            "documents": len(sizes),
            "bytes": int(sizes.sum()),
            "bits_per_byte": bits_per_byte(float(nats.sum()), int(sizes.sum())),
            "bits_per_byte_95": interval,
            "eos_nats_per_document": float(np.mean(self.eos_nats)),
            # BOS is a patch of its own, EOS and the bytes lie in the others.
            "mean_patch_bytes": (int(sizes.sum()) + 2 * len(sizes)) / sum(self.patches),
        }


def bootstrap_interval(nats: np.ndarray, n_bytes: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the interval of bits per byte that holds CONFIDENCE of resampled sets of documents.

    Args:
        nats: of each document's bytes, float64 [N].
        n_bytes: of each document, integers [N].
        seed: of the drawing.
    """
    rng, ratios = np.random.default_rng(seed), np.empty(_RESAMPLINGS)
    for i in range(_RESAMPLINGS):
        drawn = rng.integers(len(nats), size=len(nats))
        ratios[i] = nats[drawn].sum() / n_bytes[drawn].sum() / np.log(2)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def evaluate_documents(
    scorer: LikelihoodScorer, documents: Iterable[SourcedDocument], *, noise: str | None = None, seed: int = 0
) -> Mapping[str, DocumentScores]:
    """Score every byte of the documents once.

    Args:
        scorer: of the model.
        documents: of any sources.
        noise: change each text so before, see `noise.py`; bits are then those of the changed text. What it leaves
            nothing of is left out.
        seed: of the noise.

    Returns:
        The scores by source, in the order of their first documents.
    """
    by_source: dict[str, DocumentScores] = {}
    source_of: dict[int, str] = {}

    def ids():
        scored = 0
        for number, (source, _, text) in enumerate(documents):
            if noise is not None:
                text = add_noise(text, noise, seed=seed + number)
                if not text:
                    continue
            source_of[scored] = source
            scored += 1
            by_source.setdefault(source, DocumentScores())
            yield document_ids(text)

    for number, (nats, _, patches) in scorer.score(ids()):
        # The last target is EOS.
        scores = by_source[source_of.pop(number)]
        scores.add(float(nats[:-1].sum(dtype=np.float64)), float(nats[-1]), len(nats) - 1, patches)
    return by_source
