"""A run's patching rule as one value: what a checkpoint keeps, and what training, scoring and generation share.

Whole documents enter `mark`; generation, which meets one byte after another, asks `PatchCursor` after each whether the
patch ends there. Both answer alike (a test compares them), so a text is cut as it was in training.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import numpy as np

from blt_titan.byte_vocab import BYTE_OFFSET
from blt_titan.patching.entropy import EntropyRule, entropy_patch_starts
from blt_titan.patching.rounding import Storage, from_storage, to_storage
from blt_titan.patching.text import rule_patch_starts, space_like_ids

TAKES: Mapping[str, tuple[str, ...]] = {
    "space": (),
    "static": ("stride",),
    "byte": (),
    "global": ("threshold",),
    "monotonic": ("threshold",),
    "add": ("threshold", "threshold_add"),
}
"""The causal rules, each with the fields that it goes by."""


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
        """Yield a sentence for each field that the rule lacks, has in vain, or cannot use.

        Args:
            prefix: of the fields' names in the sentences, `patching.` where a TOML says them.

        >>> list(PatchRule("space", stride=4).faults())
        ["rule = 'space' with stride = 4: 'static' needs a stride of at least 1 byte, the other rules take none"]
        """
        if self.rule not in TAKES:
            yield f"{prefix}rule = {self.rule!r}: must be one of {', '.join(map(repr, TAKES))}"
            return
        takes = TAKES[self.rule]
        if (self.stride is not None) != ("stride" in takes) or (self.stride is not None and self.stride < 1):
            yield (
                f"{prefix}rule = {self.rule!r} with {prefix}stride = {self.stride}: 'static' needs a stride of at "
                "least 1 byte, the other rules take none"
            )
        for name, nats in (("threshold", self.threshold), ("threshold_add", self.threshold_add)):
            if (name in takes) != (nats is not None):
                yield (
                    f"{prefix}rule = {self.rule!r} {'needs' if name in takes else 'takes no'} {prefix}{name}, in nats; "
                    "`blt-titan calibrate` prints the lines for your data"
                )
            elif nats is not None and math.isnan(nats):
                yield f"{prefix}{name} = {nats}: must be a number of nats"
        if self.max_patch_bytes is not None and self.max_patch_bytes < 1:
            yield f"{prefix}max_patch_bytes = {self.max_patch_bytes}: must be at least 1"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    @property
    def by_entropy(self) -> bool:
        """Whether entropies decide."""
        return self.rule in get_args(EntropyRule)

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
        """
        if not self.by_entropy:
            return rule_patch_starts(
                ids,
                rule=self.rule,  # pyright: ignore[reportArgumentType]
                stride=self.stride,
                max_patch_bytes=self.max_patch_bytes,
                include_next=include_next,
            )
        assert entropies_nats is not None, f"rule={self.rule!r} needs entropies"
        return entropy_patch_starts(
            entropies_nats,
            rule=self.rule,  # pyright: ignore[reportArgumentType]
            threshold=self.threshold,
            threshold_add=self.threshold_add,
            max_patch_bytes=self.max_patch_bytes,
            begins=begins,
            include_next=include_next,
        )


class PatchCursor:
    """Follows one or several documents byte by byte, and tells after each whether a patch ends there.

    Args:
        rule: any but `topk`, which looks ahead.
        rows: documents side by side.
    """

    def __init__(self, rule: PatchRule, rows: int = 1):
        if rule.rule == "topk":
            raise ValueError("rule='topk' looks at the whole document; generation needs a causal rule")
        self._rule = rule
        self._position = np.zeros(rows, np.int64)
        self._held = np.zeros(rows, np.int64)  # since the last start that the rule set, as `limit_patch_bytes` counts
        self._before_nats = np.zeros(rows, np.float32)
        self._before_is_space_like = np.zeros(rows, bool)

    def ends(self, ids_B: np.ndarray, entropies_B: np.ndarray | None = None) -> np.ndarray:
        """Take the next byte of each document; return whether a patch ends with it, bool [B].

        Args:
            ids_B: integers.
            entropies_B: after each byte, fp32, rounded; of rules by entropy only.
        """
        rule = self._rule
        position = self._position
        special = ids_B < BYTE_OFFSET
        space_like = space_like_ids(ids_B)
        match rule.rule:
            case "space":
                ends = special | (space_like & ~self._before_is_space_like)
            case "static":
                assert rule.stride is not None
                ends = special | (position % rule.stride == 0)
            case "byte":
                ends = np.ones(len(ids_B), bool)
            case "global" | "monotonic" | "add":
                assert entropies_B is not None
                h = entropies_B.astype(np.float32)
                rises = h - self._before_nats
                # As in `entropy_patch_starts`: Python floats, so that the comparison is in float32.
                threshold = float(rule.threshold)  # pyright: ignore[reportArgumentType]
                if rule.rule == "global":
                    ends = h > threshold
                elif rule.rule == "monotonic":
                    ends = (rises > threshold) | (position == 1)
                else:
                    threshold_add = float(rule.threshold_add)  # pyright: ignore[reportArgumentType]
                    ends = (h > threshold) & (rises > threshold_add)
                    ends = (ends & (position != 2)) | (position == 1)
                ends = ends | (position == 0)
                self._before_nats = h
            case other:
                raise ValueError(f"rule={other!r} is not known")
        self._before_is_space_like = space_like
        self._position = position + 1
        self._held = np.where(ends, 0, self._held + 1)
        return ends if rule.max_patch_bytes is None else ends | (self._held % rule.max_patch_bytes == 0)

    def catch_up(self, ids_BS: np.ndarray, entropies_BS: np.ndarray | None, lengths_B: np.ndarray) -> None:
        """Take the beginnings of documents, of different lengths, before the first byte.

        Args:
            ids_BS: integers [B, S].
            entropies_BS: fp32 [B, S]; of rules by entropy only.
            lengths_B: how many of them each document has, integers [B], at least 1.
        """
        rows, last = np.arange(len(lengths_B)), lengths_B - 1
        self._position = lengths_B.astype(np.int64)
        self._before_is_space_like = space_like_ids(ids_BS[rows, last])
        if entropies_BS is not None:
            self._before_nats = entropies_BS[rows, last].astype(np.float32)
        unlimited = replace(self._rule, max_patch_bytes=None)
        for row, length in enumerate(lengths_B.tolist()):
            entropies = None if entropies_BS is None else entropies_BS[row, :length]
            starts = unlimited.mark(ids_BS[row, :length], entropies, include_next=True)
            self._held[row] = length - np.flatnonzero(starts)[-1]
