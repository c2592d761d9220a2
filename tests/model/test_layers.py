"""RoPE against complex multiplication, far positions, SwiGLU and the block from their formulas."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from blt_titan.model import layers
from blt_titan.model.attention import attend, window_mask
from blt_titan.model.layers import NORM_EPS, FeedForward, TransformerBlock, block_stack, rotary_angles, rotate

ATOL = 2e-6
"""fp32 arithmetic of unit-scale numbers in another order."""
FAR_ATOL = 2e-5
"""Attention of unit-scale vectors at position 32k: fp32 cosines of float64 angles. fp32 angles miss by 1e-3."""


def test_doctests():
    assert doctest.testmod(layers).failed == 0
    assert doctest.testmod(layers).attempted > 0


def test_rotation_is_complex_multiplication_of_neighbouring_pairs():
    generator = torch.Generator().manual_seed(0)
    pos_BS = torch.tensor([[0, 1, 2, 500], [7, 0, 31, 4096]])
    x = torch.randn(2, 4, 3, 8, generator=generator)
    got = rotate(x, rotary_angles(pos_BS, head_dim=8, theta=1e4))
    frequency = 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(2, 4, 1, 4, dtype=torch.float64), (pos_BS[..., None] * frequency)[:, :, None])
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * turn).flatten(-2)
    torch.testing.assert_close(got, expected.float(), atol=ATOL, rtol=0)
    assert rotate(x.bfloat16(), rotary_angles(pos_BS, head_dim=8, theta=1e4)).dtype == torch.bfloat16


@pytest.mark.parametrize("shift", [1, 32_768])
def test_only_differences_of_positions_matter(shift):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(3))
    mask = window_mask(torch.zeros(1, 40), window=16)
    here, there = (rotary_angles(torch.arange(40)[None] + s, head_dim=16, theta=5e5) for s in (0, shift))
    expected = attend(rotate(q, here), rotate(k, here), v, mask)
    torch.testing.assert_close(attend(rotate(q, there), rotate(k, there), v, mask), expected, atol=FAR_ATOL, rtol=0)


def test_block_is_pre_norm_with_two_residuals():
    torch.manual_seed(0)
    block = TransformerBlock(16, 2, 24)
    for norm in (block.attention_norm, block.ffn_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(1, 9, 16)
    rotation = rotary_angles(torch.arange(9)[None], head_dim=8, theta=5e5)
    mask = window_mask(torch.zeros(1, 9), window=4)

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight

    h = x + block.attention(rms(x, block.attention_norm.weight), rotation, mask)
    n = rms(h, block.ffn_norm.weight)
    w1, w2, w3 = (getattr(block.feed_forward, w).weight for w in ("w1", "w2", "w3"))
    expected = h + (F.silu(n @ w1.T) * (n @ w3.T)) @ w2.T
    torch.testing.assert_close(block(x, rotation, mask), expected, atol=ATOL, rtol=ATOL)


def test_nothing_has_a_bias():
    assert all(p.ndim == 2 or "norm" in name for name, p in block_stack(2, 16, 2, 24).named_parameters())
    assert {name for name, _ in FeedForward(4, 8).named_parameters()} == {"w1.weight", "w2.weight", "w3.weight"}
