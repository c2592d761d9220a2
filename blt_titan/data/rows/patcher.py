"""From record batches to patched ids: the rules that read text alone, and those that need entropies.

A record batch of whole documents enters, its ids and where their patches begin leave. What else decides where patches
begin is told by `decided_by`, so that a run that goes on with other patches is noticed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from blt_titan.byte_vocab import BOS_ID
from blt_titan.data.rows.packing import PatchedIds, frame_documents
from blt_titan.data.store.record_batch import RecordBatch
from blt_titan.data.store.sidecars import EntropySidecars
from blt_titan.patching.rounding import Storage
from blt_titan.patching.rule import PatchRule


class RowPatcher(Protocol):
    """What cuts the documents of rows into patches."""

    @property
    def rule(self) -> PatchRule:
        """The rule, and how entropies are rounded before it decides."""
        ...

    @property
    def decided_by(self) -> Mapping[str, Any]:
        """What decides where patches begin, as `patch_decisions` has it."""
        ...

    def read_beside(self, batch: RecordBatch) -> np.ndarray | None:
        """Return what `patch` needs beside the text and can be read ahead, in any thread; None if there is nothing.

        Raises:
            DataError: it is missing or damaged.
        """
        ...

    def patch(self, batch: RecordBatch, beside: np.ndarray | None = None) -> PatchedIds:
        """Frame and patch the documents of a record batch; `beside` is what `read_beside` returned, if it was called.

        Raises:
            DataError: what it needs beside the text is missing or damaged.
        """
        ...


class BatchEntropies(Protocol):
    """Entropies of record batches: read from sidecars, or made by a model when they are asked for."""

    @property
    def fingerprint(self) -> str:
        """Identifies the model, as `store.sidecars.fingerprint_of` does."""
        ...

    @property
    def storage(self) -> Storage:
        """How they are rounded."""
        ...

    def __call__(self, batch: RecordBatch) -> np.ndarray:
        """Return H after each byte of the text, in nats, rounded as they decide: fp32 [text bytes]."""
        ...


def patch_decisions(rule: PatchRule, entropies: str | None) -> dict[str, Any]:
    """Return what decides where a run's patches begin; a checkpoint keeps it by these keys.

    Args:
        rule: of the run.
        entropies: fingerprint of the entropy model; None for a rule that needs none.

    >>> patch_decisions(PatchRule("static", stride=4), None)["patching.stride"]
    4
    """
    decided: dict[str, Any] = {f"patching.{key}": value for key, value in rule.as_settings().items()}
    return decided if entropies is None else decided | {"entropies": entropies}


def patch_documents(
    text: np.ndarray, offsets: np.ndarray, rule: PatchRule, entropies_nats: np.ndarray | None = None
) -> PatchedIds:
    """Turn the documents of a record batch into ids, BOS and EOS included, and patches.

    Args:
        text: concatenated bytes, uint8 [N].
        offsets: document d is text[offsets[d]:offsets[d + 1]], int64 [documents + 1], offsets[0] = 0.
        rule: where patches begin.
        entropies_nats: fp32 [N], H after each byte of the text; of rules by entropy. They are given 0 for BOS and EOS,
            after which patches start anyway.
    """
    ids, is_byte = frame_documents(text, offsets)
    if entropies_nats is None:
        starts = rule.mark(ids)
    else:
        h = np.zeros(len(ids), np.float32)
        h[is_byte] = entropies_nats
        starts = rule.mark(ids, h, begins=ids == BOS_ID)
    return PatchedIds(ids, np.append(np.flatnonzero(starts), len(ids)))


@dataclass(frozen=True)
class TextPatcher:
    """Patches by a rule that reads text alone."""

    rule: PatchRule

    def __post_init__(self):
        self.rule.require(entropy_model=False)

    @property
    def decided_by(self) -> dict[str, Any]:
        """What decides where patches begin: the rule."""
        return patch_decisions(self.rule, None)

    def read_beside(self, batch: RecordBatch) -> None:
        """Return nothing: the text is all that is needed."""

    def patch(self, batch: RecordBatch, beside: np.ndarray | None = None) -> PatchedIds:
        """Frame and patch the documents of a record batch."""
        return patch_documents(batch.text, batch.offsets, self.rule)


class EntropyPatcher:
    """Patches by a rule that needs entropies.

    Args:
        rule: of the run; its `storage` becomes that of the entropies.
        entropies: of the record batches that will come.
    """

    def __init__(self, rule: PatchRule, entropies: BatchEntropies):
        rule.require(entropy_model=True)
        self.rule = replace(rule, storage=entropies.storage)
        self.entropies = entropies

    @property
    def decided_by(self) -> dict[str, Any]:
        """What decides where patches begin: the rule, and the model that the entropies are of."""
        return patch_decisions(self.rule, self.entropies.fingerprint)

    def read_beside(self, batch: RecordBatch) -> np.ndarray | None:
        """Return the entropies of a sidecar; None of a model, which scores in the order of the rows.

        Raises:
            DataError: the entropies are missing, damaged or of another text.
        """
        return self.entropies(batch) if isinstance(self.entropies, EntropySidecars) else None

    def patch(self, batch: RecordBatch, beside: np.ndarray | None = None) -> PatchedIds:
        """Frame and patch the documents of a record batch.

        Raises:
            DataError: the entropies are missing, damaged or of another text.
        """
        entropies_nats = self.entropies(batch) if beside is None else beside
        return patch_documents(batch.text, batch.offsets, self.rule, entropies_nats)
