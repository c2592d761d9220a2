"""Rows of patches that are hard on what runs over them, and what brute force makes of them."""

import torch

from blt_titan.model.kernels.gather_attention import gather_attention
from blt_titan.model.kernels.offsets import first_of_patches
from blt_titan.model.kernels.segment_attention import segment_attention

FP64_ATOL = 1e-12
"""fp64 sums of at most 512 terms of size 1, in another order."""

FP32_TOL = 512 * 2**-24
"""fp32 sums of at most 512 terms: each addition rounds to 2^-24 of what it gives, here at most all in one direction."""

BF16_RTOL = 2**-7
"""An output is rounded once, to 8 bits; inputs are the same numbers on both sides."""

TOLERANCES = {
    torch.float64: dict(atol=FP64_ATOL, rtol=0),
    torch.float32: dict(atol=FP32_TOL, rtol=FP32_TOL),
    torch.bfloat16: dict(atol=BF16_RTOL / 4, rtol=BF16_RTOL),
}
"""For values and gradients against the same in fp64."""

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

ROWS = {"odd": (ODD, 37, None), "led": (ODD, 40, LEADING), "long": (LONG, 546, None)}
"""Lengths of patches, byte slots, and bytes before the first patch."""


def drawn(shape, dtype=torch.float64, seed=0):
    """Return normal numbers that are the same for every dtype, but for rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


def case(rows: str, H: int, K: int, N: int, dtype: torch.dtype = torch.float64, device: str = "cpu"):
    """Return the patch of each byte, first slots, and three tensors of bytes and three of slots, with gradients."""
    lengths, S, leading = ROWS[rows]
    B, P = len(lengths), len(lengths[0])
    patch_BS = patches_of(lengths, S, leading).to(device)
    of_bytes = [drawn((B, S, H, K), dtype, seed).to(device).requires_grad_() for seed in range(3)]
    of_slots = [drawn((B, P, N, H, K), dtype, seed).to(device).requires_grad_() for seed in range(3, 6)]
    return patch_BS, first_of_patches(patch_BS, P), of_bytes, of_slots


def check_attention(name: str, rows: str, H: int, K: int, N: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare output and gradients of an attention with its dense twin in fp64 on the same numbers."""
    patch_BS, first, (b0, b1, b2), (s0, s1, s2) = case(rows, H, K, N, dtype, device)
    if name == "segment":
        inputs, upstream = (s0, b0, b1), s2
        out, dense = segment_attention(*inputs, first), dense_segment_attention
    else:
        inputs, upstream = (b0, s0, s1), b2
        out, dense = gather_attention(*inputs, patch_BS, first), dense_gather_attention
    exact_inputs = [x.detach().double().cpu().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, patch_BS.cpu())
    got = [out, *torch.autograd.grad(out, inputs, upstream)]
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, upstream.double().cpu())]
    for ours, right in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double().cpu(), right, **TOLERANCES[dtype])
