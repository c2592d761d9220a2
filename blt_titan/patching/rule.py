"""A run's patching rule as one value: what a checkpoint keeps, and what training, scoring and generation share.

Whole documents enter `mark`; generation, which meets one byte after another, asks `PatchCursor` after each whether the
patch ends there. Both answer alike (a test compares them), so a text is cut as it was in training.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

import blt_titan.patching.built_in  # noqa: F401  (registers them)
from blt_titan.patching.limits import ends_to_starts, limit_patch_bytes
from blt_titan.patching.registry import NextBytes, built_in_names, is_registered, rule_kind, unregistered
from blt_titan.patching.rounding import Storage, from_storage, to_storage

__all__ = ["PatchCursor", "PatchRule", "built_in_names", "is_registered"]


@dataclass(frozen=True)
class PatchRule:
    """Where patches begin; the fields but the last are those of `[patching]` in a run's TOML."""

    rule: str
    threshold: float | None = None
    """Nats, of the rules by entropy."""
    threshold_add: float | None = None
    """Nats, of the rule `add`."""
    stride: int | None = None
    """Bytes, of the rule `static`."""
    max_patch_bytes: int | None = None
    """Longer patches are split."""
    storage: Storage = "float16"
    """How entropies are rounded before they decide. Not in a TOML: a run takes it from its sidecars."""

    @classmethod
    def of(cls, settings: Any) -> "PatchRule":
        """Take the fields that are there from a mapping, or from an object, which may have others."""
        names = [field.name for field in fields(cls)]
        if isinstance(settings, Mapping):
            return cls(**{name: settings[name] for name in names if name in settings})
        return cls(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})

    def faults(self, prefix: str = "") -> Iterator[str]:
        """Yield a sentence for each field that the rule lacks, cannot use, or has without needing it.

        Args:
            prefix: of the fields' names in the sentences, `patching.` where a TOML says them.

        >>> list(PatchRule("space", stride=4).faults())
        ["rule = 'space' with stride = 4: 'space' takes no stride"]
        """
        if not is_registered(self.rule):
            yield f"{prefix}rule = {self.rule!r}: {unregistered()}"
            return
        takes = rule_kind(self.rule).takes
        if (self.stride is not None) != ("stride" in takes) or (self.stride is not None and self.stride < 1):
            needed = "needs a stride of at least 1 byte" if "stride" in takes else "takes no stride"
            yield f"{prefix}rule = {self.rule!r} with {prefix}stride = {self.stride}: {self.rule!r} {needed}"
        for name, nats in (("threshold", self.threshold), ("threshold_add", self.threshold_add)):
            if (name in takes) != (nats is not None):
                yield (
                    f"{prefix}rule = {self.rule!r} {'needs' if name in takes else 'takes no'} {prefix}{name}, in nats; "
                    "`blt-titan calibrate` prints the lines for your data"
                )
            elif nats is not None and not math.isfinite(nats):
                yield f"{prefix}{name} = {nats}: must be a finite number of nats"
        if self.max_patch_bytes is not None and self.max_patch_bytes < 1:
            yield f"{prefix}max_patch_bytes = {self.max_patch_bytes}: must be at least 1"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    @property
    def by_entropy(self) -> bool:
        """Whether entropies decide.

        Raises:
            ValueError: the rule is not registered.
        """
        return rule_kind(self.rule).by_entropy

    def as_settings(self) -> dict[str, Any]:
        """Return what `[patching]` of a TOML says, by name."""
        return {key: value for key, value in asdict(self).items() if key != "storage"}

    def require(self, *, entropy_model: bool) -> None:
        """Check that there is an entropy model if, and only if, entropies decide.

        Raises:
            ValueError: it is the other way round.
        """
        if self.by_entropy != entropy_model:
            raise ValueError(f"rule={self.rule!r} {'needs an' if self.by_entropy else 'takes no'} entropy model")

    def rounded(self, entropies_nats: np.ndarray) -> np.ndarray:
        """Round entropies as they were in training: fp32, of the same shape."""
        return from_storage(to_storage(entropies_nats, self.storage))

    def mark(
        self,
        ids: np.ndarray,
        entropies_nats: np.ndarray | None = None,
        *,
        begins: np.ndarray | None = None,
        include_next: bool = False,
    ) -> np.ndarray:
        """Mark where patches start in whole documents, or in the beginning of one.

        Args:
            ids: integers [N].
            entropies_nats: fp32 [N], rounded; only of rules by entropy.
            begins: where documents begin, bool [N]; None for one document.
            include_next: also return the position after the last.

        Returns:
            bool [N], or [N + 1] with `include_next`.

        Raises:
            ValueError: the rule is not registered, lacks an option or got one that it does not use.
        """
        if faults := list(self.faults()):
            raise ValueError("; ".join(faults))
        kind = rule_kind(self.rule)
        assert entropies_nats is not None or not kind.by_entropy, f"rule={self.rule!r} needs entropies"
        ends = kind.mark_all(self, ids, entropies_nats if kind.by_entropy else None, begins)
        return limit_patch_bytes(ends_to_starts(ends, include_next=include_next), self.max_patch_bytes)


class PatchCursor:
    """Follows one or several documents byte by byte, and tells after each whether a patch ends there.

    Args:
        rule: a registered one. One that has no `mark_next` is asked about the whole document anew at each byte.
        rows: documents side by side.

    Raises:
        ValueError: the rule is not registered.
    """

    def __init__(self, rule: PatchRule, rows: int = 1):
        self._rule, self._mark_next = rule, rule_kind(rule.rule).mark_next
        self._unlimited = replace(rule, max_patch_bytes=None)
        self._position = np.zeros(rows, np.int64)
        self._held = np.zeros(rows, np.int64)  # since the last start that the rule set, as `limit_patch_bytes` counts
        self._before_ids = np.zeros(rows, np.int64)
        self._before_nats = np.zeros(rows, np.float32)
        self._read: list[tuple[list[int], list[float]]] = [([], []) for _ in range(rows)]

    def ends(self, ids_B: np.ndarray, entropies_B: np.ndarray | None = None) -> np.ndarray:
        """Take the next byte of each document; return whether a patch ends with it, bool [B].

        Args:
            ids_B: integers.
            entropies_B: after each byte, fp32, rounded; of rules by entropy only.
        """
        rule = self._rule
        if entropies_B is not None:
            entropies_B = entropies_B.astype(np.float32)
        if self._mark_next is None:
            ends = self._marked_anew(ids_B, entropies_B)
        else:
            at = NextBytes(ids_B, entropies_B, self._position, self._before_ids, self._before_nats)
            ends = self._mark_next(rule, at)
        self._before_ids = ids_B
        if entropies_B is not None:
            self._before_nats = entropies_B
        self._position = self._position + 1
        self._held = np.where(ends, 0, self._held + 1)
        return ends if rule.max_patch_bytes is None else ends | (self._held % rule.max_patch_bytes == 0)

    def _marked_anew(self, ids_B: np.ndarray, entropies_B: np.ndarray | None) -> np.ndarray:
        ends = np.empty(len(ids_B), bool)
        for row, (ids, nats) in enumerate(self._read):
            ids.append(int(ids_B[row]))
            if entropies_B is not None:
                nats.append(float(entropies_B[row]))
            entropies = None if entropies_B is None else np.array(nats, np.float32)
            ends[row] = self._unlimited.mark(np.array(ids), entropies, include_next=True)[-1]
        return ends

    def catch_up(self, ids_BS: np.ndarray, entropies_BS: np.ndarray | None, lengths_B: np.ndarray) -> None:
        """Take the beginnings of documents, of different lengths, before the first byte.

        Args:
            ids_BS: integers [B, S].
            entropies_BS: fp32 [B, S]; of rules by entropy only.
            lengths_B: how many of them each document has, integers [B], at least 1.
        """
        rows, last = np.arange(len(lengths_B)), lengths_B - 1
        self._position = lengths_B.astype(np.int64)
        self._before_ids = ids_BS[rows, last]
        if entropies_BS is not None:
            self._before_nats = entropies_BS[rows, last].astype(np.float32)
        for row, length in enumerate(lengths_B.tolist()):
            entropies = None if entropies_BS is None else entropies_BS[row, :length]
            starts = self._unlimited.mark(ids_BS[row, :length], entropies, include_next=True)
            self._held[row] = length - np.flatnonzero(starts)[-1]
            if self._mark_next is None:
                self._read[row] = (ids_BS[row, :length].tolist(), [] if entropies is None else entropies.tolist())
