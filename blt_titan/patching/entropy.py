"""Patches from the entropies of a small byte model: a patch starts where the next byte is hard to foresee.

The entropies of one document, or of several side by side, enter; a mask of patch starts, or the patch lengths,
leaves. H[i] is the entropy, in nats, of the next-byte distribution after position i was read, so H[i-1] decides whether
position i starts a patch. Positions 0 (BOS) and 1 always start one. Paper: arXiv 2412.09871, section 2.3.

    document         <s>   t    h    e   ␣    c    a    t   ␣    s
    H                5.0  .4  2.0   .3  .2  1.9  1.6   .1 3.0   .2
    > 1.335            *         *            *    *        *
    global, 1.335    <s>| t    h |  e   ␣    c |  a |  t   ␣ |  s      1,2,3,1,2,1

What decides is float32: entropies and thresholds are rounded to it. Whoever computes entropies anew rounds
them first as they are stored (`rounding.py`), or training and generation cut differently.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, assert_never

import numpy as np
import torch

from blt_titan.patching.limits import ArrayT, ends_to_starts, limit_patch_bytes, starts_to_lengths

EntropyRule = Literal["global", "monotonic", "add", "topk"]
_OPTIONS: dict[str, tuple[str, ...]] = {
    "global": ("threshold",),
    "monotonic": ("threshold",),
    "add": ("threshold", "threshold_add"),
    "topk": ("patch_size",),
}


def entropy_patch_starts(
    entropies_nats: ArrayT,
    *,
    rule: EntropyRule = "global",
    threshold: float | None = None,
    threshold_add: float | None = None,
    patch_size: int | None = None,
    include_next: bool = False,
    max_patch_bytes: int | None = None,
    begins: ArrayT | None = None,
) -> ArrayT:
    """Mark where patches start in one document, or in each of several.

    Positions 0 and 1 always start one. A later position j starts one iff, by rule:

    - `global`: H[j-1] > threshold.
    - `monotonic`: H[j-1] - H[j-2] > threshold; position 2 always starts.
    - `add`: H[j-1] > threshold and H[j-1] - H[j-2] > threshold_add; position 2 starts, 3 does not.
    - `topk`: H[j-1] is among the N // patch_size - 2 largest of H[1:], ties going to the earliest. It looks
      at the whole document, so it is for analysis, never for a causal model.

    Args:
        entropies_nats: float [N], compared in float32.
        rule: one of the above.
        threshold: nats; for every rule but `topk`.
        threshold_add: nats; for `add` only.
        patch_size: mean patch size aimed at, in bytes; for `topk` only.
        include_next: also return the lookahead position N, the target of the last byte.
        max_patch_bytes: longer patches are split; None for no limit.
        begins: where documents of at least two positions begin, bool [N], True at 0; None for one document. Positions
            then count from their document's own. Not for `topk`.

    Returns:
        bool [N], or [N + 1] with `include_next`; of the same kind and on the same device as the entropies.

    Raises:
        ValueError: the rule is unknown, lacks an option or got one that it does not use, an option is out of
            range, or the entropies are not 1-D, empty or NaN (NaN is looked for in numpy arrays only: with
            tensors the host would wait for the device).
    """
    ends = entropy_patch_ends(
        entropies_nats,
        rule=rule,
        threshold=threshold,
        threshold_add=threshold_add,
        patch_size=patch_size,
        include_next=include_next,
        begins=begins,
    )
    return limit_patch_bytes(ends_to_starts(ends, include_next=include_next), max_patch_bytes)


def entropy_patch_ends(
    entropies_nats: ArrayT,
    *,
    rule: EntropyRule,
    threshold: float | None = None,
    threshold_add: float | None = None,
    patch_size: int | None = None,
    include_next: bool = True,
    begins: ArrayT | None = None,
) -> Any:
    """Mark where patches end, bool [N]: the position after one that is marked begins a patch.

    Arguments and errors are those of `entropy_patch_starts`; `include_next` matters to `topk` alone.
    """
    number = _checked_options(rule, threshold=threshold, threshold_add=threshold_add, patch_size=patch_size)
    h_N = _checked_entropies(entropies_nats)
    if begins is not None and (begins.shape != h_N.shape or rule == "topk"):
        raise ValueError(
            f"begins: bool of the entropies' shape {tuple(h_N.shape)} for every rule but 'topk', got "
            f"{tuple(begins.shape)} for rule={rule!r}"
        )
    match rule:
        case "global":
            ends = h_N > number["threshold"]
        case "monotonic":
            ends = _rises(h_N) > number["threshold"]
            _set_nth(ends, 1, begins, True)
        case "add":
            ends = (h_N > number["threshold"]) & (_rises(h_N) > number["threshold_add"])
            _set_nth(ends, 2, begins, False)
            _set_nth(ends, 1, begins, True)
        case "topk":
            assert patch_size is not None
            ends = _topk_ends(h_N, patch_size, include_next)
        case _:
            assert_never(rule)
    _set_nth(ends, 0, begins, True)
    if begins is not None:
        ends[:-1] |= begins[1:]  # a document's last position ends a patch
    return ends


def patch_lengths(
    entropies_nats: ArrayT | Sequence[float],
    threshold: float | None = None,
    *,
    threshold_add: float | None = None,
    rule: EntropyRule = "global",
    include_next: bool = False,
    max_patch_bytes: int | None = None,
    patch_size: int | None = None,
) -> ArrayT:
    """Cut one document into patches by its entropies; the options are those of `entropy_patch_starts`.

    >>> h = [5.0, 0.4, 2.0, 0.3, 0.2, 1.9, 1.6, 0.1, 3.0, 0.2]
    >>> patch_lengths(h, threshold=1.335).tolist()
    [1, 2, 3, 1, 2, 1]
    >>> patch_lengths(h, threshold=1.335, include_next=True).tolist()
    [1, 2, 3, 1, 2, 2]

    Args:
        entropies_nats: float [N]; a plain list is read as a numpy array.
        threshold: see `entropy_patch_starts`, as for the rest.
        threshold_add: for the rule `add`.
        rule: `global`, `monotonic`, `add` or `topk`.
        include_next: count the lookahead position N too.
        max_patch_bytes: longer patches are split.
        patch_size: for the rule `topk`.

    Returns:
        int64 [P] that sums to N, or to N + 1 with `include_next`.

    Raises:
        ValueError: as `entropy_patch_starts`.
    """
    h_N: Any = entropies_nats if isinstance(entropies_nats, torch.Tensor) else np.asarray(entropies_nats)
    starts = entropy_patch_starts(
        h_N,
        rule=rule,
        threshold=threshold,
        threshold_add=threshold_add,
        patch_size=patch_size,
        include_next=include_next,
        max_patch_bytes=max_patch_bytes,
    )
    return starts_to_lengths(starts)


def _set_nth(ends: Any, n: int, begins: Any, value: bool) -> None:
    """Set the n-th position of each document."""
    if begins is None:
        ends[n : n + 1] = value
    elif value:
        ends[n:] |= begins[: len(begins) - n]
    else:
        ends[n:] &= ~begins[: len(begins) - n]


def _rises(h_N: Any) -> Any:
    """Return H[i] - H[i-1], float32 [N]; position 0 has no predecessor and holds H[0]."""
    rises_N = h_N + 0.0
    rises_N[1:] -= h_N[:-1]
    return rises_N


def _topk_ends(h_N: Any, patch_size: int, include_next: bool) -> Any:
    """Mark the positions after which `topk` starts a patch, bool [N]."""
    # The last position decides about the lookahead position only.
    candidates = h_N[1:] if include_next else h_N[1:-1]
    count = min(max(h_N.shape[0] // patch_size - 2, 0), candidates.shape[0])
    ends = h_N != h_N
    if count == 0:
        return ends
    if isinstance(h_N, torch.Tensor):
        smallest_chosen = torch.topk(candidates, count, sorted=False).values.min()
    else:
        smallest_chosen = np.partition(candidates, -count)[-count]
    above, tied = candidates > smallest_chosen, candidates == smallest_chosen
    # Of the tied positions the earliest fill what is left of the count.
    ends[1 : 1 + candidates.shape[0]] = above | (tied & (tied.cumsum(0) <= count - above.sum()))
    return ends


def _checked_entropies(entropies_nats: np.ndarray | torch.Tensor) -> Any:
    """Return the entropies as float32 [N]."""
    if entropies_nats.ndim != 1 or entropies_nats.shape[0] == 0:
        raise ValueError(
            "entropies_nats: must be 1-D, one document of at least one position, got shape "
            f"{tuple(entropies_nats.shape)}"
        )
    if isinstance(entropies_nats, torch.Tensor):
        return entropies_nats.to(torch.float32)
    is_nan = np.isnan(entropies_nats)
    if is_nan.any():
        raise ValueError(
            f"entropies_nats: {is_nan.sum()} of {is_nan.size} values are NaN, the first at position {is_nan.argmax()}"
        )
    return entropies_nats.astype(np.float32, copy=False)


def _checked_options(rule: str, **options: float | None) -> dict[str, float]:
    """Refuse an option that the rule lacks, and one that it would ignore; return the others as Python floats.

    Numpy and torch compare float32 with a Python float in float32, but numpy compares with a np.float64 in float64.
    """
    if rule not in _OPTIONS:
        raise ValueError(f"rule={rule!r}: must be one of {', '.join(_OPTIONS)}")
    for name, value in options.items():
        needed = name in _OPTIONS[rule]
        if needed and (value is None or math.isnan(value)):
            raise ValueError(f"{name}={value}: rule={rule!r} needs a number")
        if not needed and value is not None:
            raise ValueError(f"{name}={value}: rule={rule!r} takes only {' and '.join(_OPTIONS[rule])}")
    patch_size = options["patch_size"]
    if patch_size is not None and patch_size < 1:
        raise ValueError(f"patch_size={patch_size}: must be at least 1")
    return {name: float(value) for name, value in options.items() if value is not None}
