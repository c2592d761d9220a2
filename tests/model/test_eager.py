"""What eager blocks compute by hand, against the plain forms: outputs, gradients in fp64, and what is kept."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from blt_titan.model.eager import RMSNorm, gated_linear, rotate_pairs
from blt_titan.model.layers import TransformerBlock
from tests.helpers.saved_memory import saved_bytes

ATOL = 1e-12
"""fp64 arithmetic of unit-scale numbers in another order."""


def drawn(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def compare(ours, plain, inputs):
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1), dtype=plain.dtype)
    torch.testing.assert_close(ours, plain, atol=ATOL, rtol=0)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, atol=20 * ATOL, rtol=0)


@pytest.mark.parametrize("shape", [(2, 7, 16), (3, 16), (2, 5, 2, 16)])
def test_norm(shape):
    norm = RMSNorm(16, eps=1e-5, dtype=torch.float64)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = drawn(*shape)
    with torch.no_grad():
        x[0, 0] = 0.0  # what padding may be: nothing to divide by
    compare(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5), (x, norm.weight))


def test_gated_linear():
    linear = nn.Linear(24, 16, bias=False, dtype=torch.float64)
    gate, x = drawn(2, 7, 24), drawn(2, 7, 24)
    with torch.no_grad():
        x.mul_(0.5)
    compare(gated_linear(gate, x, linear), linear(F.silu(gate) * x), (gate, x, linear.weight))


def test_gated_linear_in_autocast():
    """Projections are bf16 there, and the weight is cast as the linear's own forward would cast it."""
    linear = nn.Linear(24, 16, bias=False)
    gate, x = (drawn(7, 24, dtype=torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = gated_linear(gate, x, linear), linear(F.silu(gate) * x)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
    for got, expected in zip(
        torch.autograd.grad(ours.float().sum(), (gate, linear.weight)),
        torch.autograd.grad(plain.float().sum(), (gate, linear.weight)),
        strict=True,
    ):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=0.1, rtol=0.02)  # bf16 has 8 bits


def test_rotation():
    x, angle = drawn(2, 5, 3, 8, dtype=torch.float32), drawn(2, 5, 1, 4, dtype=torch.float32).detach()
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    plain = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    ours = rotate_pairs(x, cos, sin)
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    got, expected = (torch.autograd.grad(out, x, upstream)[0] for out in (ours, plain))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_modules_that_are_more_than_a_linear_are_called():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    linear = Doubled(24, 16, bias=False, dtype=torch.float64)
    gate, x = drawn(7, 24), drawn(7, 24)
    assert torch.equal(gated_linear(gate, x, linear), linear(F.silu(gate) * x))


def test_what_a_block_keeps():
    """Input, two normed, q, k, v, what attention gave, the sum: 8 D a slot, and two of the hidden width, not four."""
    dim, hidden, S = 32, 256, 64
    block = TransformerBlock(dim, 2, hidden)
    cos_sin = torch.ones(1, S, 1, 8), torch.zeros(1, S, 1, 8)
    x = torch.randn(1, S, dim, requires_grad=True)
    with saved_bytes(block) as kept:
        block(x, cos_sin, None, lambda q, k, v, mask: q * k * v)
    floats = kept.total / 4 / S
    assert floats <= 10 * dim + 2 * hidden + 16
