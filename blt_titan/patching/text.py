"""Patches from the bytes alone: at spaces, at a fixed stride, or one for each byte.

Ids of documents (BOS, bytes, EOS) enter, any number of them one after another, or a stretch that begins in
the middle of one; a mask of patch starts leaves. Every special id ends a patch, so no patch lies in two
documents. A byte is *space-like* if it is neither ASCII alphanumeric nor a UTF-8 continuation byte; the first
byte of a letter beyond ASCII is therefore space-like too. The space rule ends a patch at the first space-like
byte of a run:

    ids          <s> H i , ␣ i t ' s ␣ 4 2 % ␣ o f ␣ CF 80 . </s>     "π" is the bytes CF 80
    space-like         . . * * . . * . * . . * * . . * *  .  *
    patches      1  3      4       2   3     4       3        1
"""

from typing import Any, Literal, get_args

import numpy as np
import torch

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET, VOCAB_SIZE
from blt_titan.patching.limits import ArrayT, ends_to_starts, limit_patch_bytes, positions_since

TextRule = Literal["space", "static", "byte"]


def rule_patch_starts(
    ids: ArrayT,
    *,
    rule: TextRule = "space",
    stride: int | None = None,
    max_patch_bytes: int | None = None,
    include_next: bool = False,
) -> ArrayT:
    """Mark where patches start, by a rule that reads bytes only.

    Args:
        ids: integers [N], see `space_patch_starts`.
        rule: `space`, `static` or `byte`.
        stride: bytes in a patch; for `static` only.
        max_patch_bytes: longer patches are split; None for no limit.
        include_next: also return the lookahead position N.

    Returns:
        bool [N], or [N + 1] with `include_next`.

    Raises:
        ValueError: the rule is unknown, lacks `stride` or does not use it, or as the rule's own function.
    """
    if rule != "static" and stride is not None:
        raise ValueError(f"stride={stride}: rule={rule!r} does not use it, only 'static' does")
    match rule:
        case "space":
            return space_patch_starts(ids, include_next=include_next, max_patch_bytes=max_patch_bytes)
        case "static":
            return static_patch_starts(ids, stride=stride, include_next=include_next, max_patch_bytes=max_patch_bytes)
        case "byte":
            return byte_patch_starts(ids, include_next=include_next, max_patch_bytes=max_patch_bytes)
        case _:
            raise ValueError(f"rule={rule!r}: must be one of {', '.join(get_args(TextRule))}")


def space_patch_starts(ids: ArrayT, *, include_next: bool = False, max_patch_bytes: int | None = None) -> ArrayT:
    """Start a patch after a space-like byte whose predecessor is not one, and after every special id.

    >>> from blt_titan.byte_vocab import document_ids
    >>> space_patch_starts(document_ids(b"to be,  or")).astype(int).tolist()
    [1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0]

    Args:
        ids: integers [N] of at least 16 bits, byte + 4 or a special id.
        include_next: also return the lookahead position N, the target of the last id.
        max_patch_bytes: longer patches are split; None for no limit.

    Returns:
        bool [N], or [N + 1] with `include_next`; of the same kind and on the same device as `ids`.

    Raises:
        ValueError: `ids` are not 1-D or not integers of at least 16 bits, a numpy array holds one outside the
            vocabulary, or `max_patch_bytes` is below 1.
    """
    return limit_patch_bytes(ends_to_starts(space_patch_ends(ids), include_next=include_next), max_patch_bytes)


def space_patch_ends(ids: ArrayT) -> Any:
    """Mark where patches end by the rule `space`, bool [N]; arguments and errors as `space_patch_starts`."""
    _check_ids(ids)
    special: Any = ids < BYTE_OFFSET
    # A look-up is several times faster than comparing, but on a device the table would have to be copied there.
    space_like: Any = _is_space_like(ids) if isinstance(ids, torch.Tensor) else _SPACE_LIKE_IDS[ids]
    ends = special | space_like
    ends[1:] &= ~(space_like[1:] & space_like[:-1])
    return ends


def static_patch_starts(
    ids: ArrayT, *, stride: int | None, include_next: bool = False, max_patch_bytes: int | None = None
) -> ArrayT:
    """Start a patch at positions 0 and 1 of each document, then at every `stride`-th one.

    One also starts after every special id. A document begins at BOS; a stretch that begins without one counts
    from its own position 0.

    >>> from blt_titan.byte_vocab import document_ids
    >>> static_patch_starts(document_ids(b"to be or"), stride=3).astype(int).tolist()
    [1, 1, 0, 0, 1, 0, 0, 1, 0, 0]

    Args:
        ids: as `space_patch_starts`.
        stride: bytes in a patch, at least 1.
        include_next: also return the lookahead position N, the target of the last id.
        max_patch_bytes: longer patches are split; None for no limit.

    Returns:
        bool [N], or [N + 1] with `include_next`.

    Raises:
        ValueError: `stride` is below 1, or as `space_patch_starts`.
    """
    ends = static_patch_ends(ids, stride=stride)
    return limit_patch_bytes(ends_to_starts(ends, include_next=include_next), max_patch_bytes)


def static_patch_ends(ids: ArrayT, *, stride: int | None) -> Any:
    """Mark where patches end by the rule `static`, bool [N]; arguments and errors as `static_patch_starts`."""
    _check_ids(ids)
    if stride is None:
        raise ValueError("stride=None: rule='static' needs a number of bytes, at least 1")
    if stride < 1:
        raise ValueError(f"stride={stride}: must be at least 1")
    begins: Any = ids == BOS_ID
    # Position p of a document ends a patch iff p + 1 starts one, which 1, 1 + stride, 1 + 2 * stride, ... do.
    ends = (positions_since(begins) % stride == 0) | (ids < BYTE_OFFSET)
    ends[:-1] |= begins[1:]
    return ends


def byte_patch_starts(ids: ArrayT, *, include_next: bool = False, max_patch_bytes: int | None = None) -> ArrayT:
    """Start a patch at every position; arguments, result and errors as `space_patch_starts`."""
    return limit_patch_bytes(ends_to_starts(byte_patch_ends(ids), include_next=include_next), max_patch_bytes)


def byte_patch_ends(ids: ArrayT) -> Any:
    """Mark where patches end by the rule `byte`: everywhere, bool [N]."""
    _check_ids(ids)
    return ids == ids


def space_like_ids(ids: np.ndarray) -> np.ndarray:
    """Mark the ids of bytes that are neither ASCII alphanumeric nor UTF-8 continuations: integers [N] -> bool [N]."""
    return _SPACE_LIKE_IDS[ids]


def _is_space_like(ids: Any) -> Any:
    """Mark the bytes that are neither ASCII alphanumeric nor UTF-8 continuations: bool [N]; no special id is."""
    alphanumeric = _in_bytes(ids, "0", "9") | _in_bytes(ids, "A", "Z") | _in_bytes(ids, "a", "z")
    return ~(alphanumeric | _in_bytes(ids, "\x80", "\xbf") | (ids < BYTE_OFFSET))


def _in_bytes(ids: Any, first: str, last: str) -> Any:
    """Mark the ids of the bytes from `first` to `last`, both included: bool [N]."""
    return (ids >= BYTE_OFFSET + ord(first)) & (ids <= BYTE_OFFSET + ord(last))


def _check_ids(ids: np.ndarray | torch.Tensor) -> None:
    if ids.ndim != 1:
        raise ValueError(f"ids: must be 1-D, got shape {tuple(ids.shape)}")
    if isinstance(ids, torch.Tensor):
        integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    else:
        integers = np.issubdtype(ids.dtype, np.integer)
    # uint8 would be raw bytes: the vocabulary of 260 does not fit.
    if not integers or ids.dtype.itemsize < 2:
        raise ValueError(f"ids: must be integers of at least 16 bits, byte + {BYTE_OFFSET}, got {ids.dtype}")
    if isinstance(ids, np.ndarray) and ids.size and (ids.min() < 0 or ids.max() >= VOCAB_SIZE):
        raise ValueError(f"ids: must lie in 0..{VOCAB_SIZE - 1}, got {ids.min()}..{ids.max()}")


_SPACE_LIKE_IDS = _is_space_like(np.arange(VOCAB_SIZE))
