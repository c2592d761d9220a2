"""Rows of patches that are hard on what runs over them, and what brute force makes of them."""

import torch

ODD = [
    [3, 0, 0, 1, 7, 2, 5, 0, 1, 6, 0],
    [0, 1, 15, 1, 1, 0, 3, 3, 3, 3, 0],
    [0] * 11,
    [1] * 11,
]
"""Lengths of patches of four rows: empty at both ends and side by side, a row of nothing, a row of single bytes."""

LONG = [[1, 512, 0, 33], [64, 1, 16, 17]]
"""Lengths of patches of two rows, the longest that the shipped settings allow among them."""

LEADING = [2, 0, 1, 3]
"""Bytes without a patch before the first with one, by row."""


def patches_of(lengths: list[list[int]], byte_slots: int, leading: list[int] | None = None) -> torch.Tensor:
    """Return the patch of each byte, int32 [B, S], -1 for none."""
    patch_BS = torch.full((len(lengths), byte_slots), -1, dtype=torch.int32)
    for b, row in enumerate(lengths):
        held = torch.repeat_interleave(torch.arange(len(row), dtype=torch.int32), torch.tensor(row))
        begin = leading[b] if leading else 0
        patch_BS[b, begin : begin + len(held)] = held
    return patch_BS


def dense_segment_attention(q_BPNHK, k_BSHK, v_BSHK, patch_BS):
    """Attend under a mask [B, P, S]; differentiable."""
    visible_BPS = patch_BS[:, None, :] == torch.arange(q_BPNHK.shape[1])[:, None]
    score = torch.einsum("bpnhk,bshk->bpnhs", q_BPNHK, k_BSHK) * q_BPNHK.shape[-1] ** -0.5
    visible = visible_BPS[:, :, None, None, :]
    weight = score.masked_fill(~visible, -1e30).softmax(-1) * visible
    return torch.einsum("bpnhs,bshk->bpnhk", weight, v_BSHK)


def dense_gather_attention(q_BSHK, k_BPNHK, v_BPNHK, source_BS):
    """Attend under a mask [B, S, P]; differentiable."""
    visible_BSP = source_BS[:, :, None] == torch.arange(k_BPNHK.shape[1])
    score = torch.einsum("bshk,bpnhk->bshpn", q_BSHK, k_BPNHK) * q_BSHK.shape[-1] ** -0.5
    visible = visible_BSP[:, :, None, :, None]
    weight = score.masked_fill(~visible, -1e30).flatten(3).softmax(-1).view_as(score) * visible
    return torch.einsum("bshpn,bpnhk->bshk", weight, v_BPNHK)


def looped_segment_max(x_BSX, patch_BS, n_patches):
    """Take the maximum patch by patch; `amax` shares the gradient of ties evenly."""
    rows = []
    for x_SX, patch_S in zip(x_BSX, patch_BS, strict=True):
        held = [x_SX[patch_S == p] for p in range(n_patches)]
        rows.append(torch.stack([h.amax(0) if len(h) else x_SX.new_zeros(x_SX.shape[1]) for h in held]))
    return torch.stack(rows)
