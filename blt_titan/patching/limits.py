"""Masks of patch starts: how rules make them, how patches are bounded, and their lengths.

A mask is bool [N]; position j is True where a patch starts, and position 0 always does. All functions take
numpy arrays or torch tensors and return the same kind, tensors on the device of the input. Only the
conversions between masks and lengths wait for the device, because the size of their result depends on the
data.

The bound counts from the last start that the *rule* set, so it looks at no later position:

    rule's patches                      7           2   5
    starts                              1000000     10  10000
    max_patch_bytes=3                   1001001     10  10010
    patches                             3  3  1     2   3  2
"""

from typing import Any, TypeVar

import numpy as np
import torch

ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


def ends_to_starts(ends: ArrayT, *, include_next: bool) -> ArrayT:
    """Turn "a patch ends at i" into "a patch starts at i + 1"; position 0 always starts.

    Args:
        ends: bool [N].
        include_next: also return the lookahead position N, the target of the last byte.

    Returns:
        bool [N], or [N + 1] with `include_next`.
    """
    if isinstance(ends, torch.Tensor):
        starts = torch.cat((ends.new_ones(1), ends))
        return starts if include_next else starts[:-1]
    starts = np.concatenate((np.ones(1, dtype=bool), ends))
    return starts if include_next else starts[:-1]


def positions_since(marks: ArrayT) -> ArrayT:
    """Count the positions since the last marked one, which counts 0; position 0 is taken as marked.

    >>> positions_since(np.array([True, False, False, True, False])).tolist()
    [0, 1, 2, 0, 1]

    Args:
        marks: bool [N].

    Returns:
        int32 [N] (int64 from 2**31 positions on), which takes half the time of int64.
    """
    short = marks.shape[0] < 2**31
    # `index * marks` and not `where(marks, index, 0)`: torch.where would copy its scalar to the device.
    if isinstance(marks, torch.Tensor):
        index = torch.arange(marks.shape[0], dtype=torch.int32 if short else torch.int64, device=marks.device)
        return index - torch.cummax(index * marks, dim=0).values
    index = np.arange(marks.shape[0], dtype=np.int32 if short else np.int64)
    return index - np.maximum.accumulate(index * marks)


def limit_patch_bytes(starts: ArrayT, max_patch_bytes: int | None) -> ArrayT:
    """Split longer patches: a position also starts one when the current patch already holds the maximum.

    >>> limit_patch_bytes(lengths_to_starts(np.array([1, 5])), 2).astype(int).tolist()
    [1, 1, 0, 1, 0, 1]

    Args:
        starts: bool [N], from a rule.
        max_patch_bytes: positions that a patch may hold, at least 1; None leaves `starts` as it is.

    Returns:
        bool [N].

    Raises:
        ValueError: `max_patch_bytes` is below 1.
    """
    if max_patch_bytes is None:
        return starts
    if max_patch_bytes < 1:
        raise ValueError(f"max_patch_bytes={max_patch_bytes}: must be at least 1, or None for no limit")
    if isinstance(starts, np.ndarray):
        first = np.flatnonzero(starts)
        # The usual case costs a tenth. On a device the question itself would wait for the host.
        if not len(first) or np.diff(first, append=len(starts)).max() <= max_patch_bytes:
            return starts
    held: Any = positions_since(starts)
    return held % max_patch_bytes == 0


def starts_to_lengths(starts: ArrayT) -> ArrayT:
    """Return the length of each patch, in order.

    >>> starts_to_lengths(np.array([True, True, False, False, True])).tolist()
    [1, 3, 1]

    Args:
        starts: bool [N], True at position 0.

    Returns:
        int64 [P], summing to N, where P is the number of starts.

    Raises:
        ValueError: `starts` is not 1-D, not bool, or False at position 0.
    """
    if starts.ndim != 1 or starts.dtype not in (np.bool_, torch.bool):
        raise ValueError(f"starts: must be a 1-D bool mask, got {starts.dtype} of shape {tuple(starts.shape)}")
    if starts.shape[0] and not starts[0]:
        raise ValueError("starts: position 0 must start a patch")
    if isinstance(starts, torch.Tensor):
        first = torch.nonzero(starts).squeeze(1)
        return torch.diff(first, append=first.new_full((1,), starts.shape[0]))
    return np.diff(np.flatnonzero(starts), append=starts.shape[0])


def lengths_to_starts(lengths: ArrayT) -> ArrayT:
    """Return the mask of which `starts_to_lengths` gives these lengths.

    >>> lengths_to_starts(np.array([1, 3, 1, 0, 0])).astype(int).tolist()
    [1, 1, 0, 0, 1]

    Args:
        lengths: integers [P], positive, then any number of zeros as padding.

    Returns:
        bool [N], where N is the sum of the lengths.

    Raises:
        ValueError: `lengths` is not 1-D, holds a negative number, or a zero before a positive one.
    """
    if lengths.ndim != 1:
        raise ValueError(f"lengths: must be 1-D, got shape {tuple(lengths.shape)}")
    if (lengths < 0).any() or ((lengths[:-1] == 0) & (lengths[1:] > 0)).any():
        raise ValueError("lengths: must be positive, with zeros only as padding on the right")
    if isinstance(lengths, torch.Tensor):
        lengths_P = lengths[lengths > 0]
        starts = torch.zeros(int(lengths_P.sum()), dtype=torch.bool, device=lengths.device)
        return starts.index_fill_(0, torch.cumsum(lengths_P, dim=0) - lengths_P, True)
    lengths_P = lengths[lengths > 0]
    starts = np.zeros(int(lengths_P.sum()), dtype=bool)
    starts[np.cumsum(lengths_P) - lengths_P] = True
    return starts
