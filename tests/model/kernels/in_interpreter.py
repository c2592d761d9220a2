"""The Triton kernels on CPU tensors, under `TRITON_INTERPRET=1`, against dense masks and loops in fp64.

`test_triton.py` starts pytest on this file with the variable set: it must be there before triton is imported.
"""

import os

import pytest
import torch

from blt_titan.model.kernels import gather_attention_triton, segment_attention_triton, segment_max_triton
from blt_titan.model.kernels.offsets import first_of_patches
from tests.helpers.byte_runs import (
    ODD,
    ROWS,
    TOLERANCES,
    dense_gather_attention,
    dense_segment_attention,
    drawn,
    looped_segment_max,
    patches_of,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton.py"

ODD_ROWS, LONG_ROWS = ROWS["led"], ROWS["long"]


def compare(got, exact_function, inputs, upstream):
    """Compare an output and gradients with the twin in fp64 on the same numbers."""
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = exact_function(*exact_inputs)
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, upstream.double())]
    for ours, right in zip(got, expected, strict=True):
        assert ours.dtype == upstream.dtype
        torch.testing.assert_close(ours.double(), right, **TOLERANCES[upstream.dtype])


CASES = [
    (ODD_ROWS, 2, 32, 1, torch.float32),
    (ODD_ROWS, 1, 64, 2, torch.bfloat16),
    (ODD_ROWS, 1, 5, 3, torch.float64),
    (ODD_ROWS, 1, 64, 4, torch.float32),
    (LONG_ROWS, 1, 64, 2, torch.float32),
    (LONG_ROWS, 1, 32, 4, torch.bfloat16),
]
"""Rows, heads, head size, slots of a patch, dtype. The interpreter takes milliseconds for each patch and head."""


@pytest.mark.parametrize(("rows", "H", "K", "N", "dtype"), CASES)
def test_attention_of_segments(rows, H, K, N, dtype):
    lengths, S, leading = rows
    B, P = len(lengths), len(lengths[0])
    patch_BS = patches_of(lengths, S, leading)
    first = first_of_patches(patch_BS, P)
    q, upstream = (drawn((B, P, N, H, K), dtype, seed) for seed in (0, 1))
    k, v = (drawn((B, S, H, K), dtype, seed) for seed in (2, 3))
    out, lse = segment_attention_triton.forward(q, k, v, first)
    gradients = segment_attention_triton.backward(upstream, q, k, v, first, lse)
    compare([out, *gradients], lambda *x: dense_segment_attention(*x, patch_BS), (q, k, v), upstream)
    assert not out[first.diff() == 0].any()
    for gradient in gradients[1:]:
        assert not gradient[patch_BS < 0].any()


@pytest.mark.parametrize(("rows", "H", "K", "N", "dtype"), CASES)
def test_attention_by_index(rows, H, K, N, dtype):
    lengths, S, leading = rows
    B, P = len(lengths), len(lengths[0])
    source_BS = patches_of(lengths, S, leading)
    first = first_of_patches(source_BS, P)
    q, upstream = (drawn((B, S, H, K), dtype, seed) for seed in (0, 1))
    k, v = (drawn((B, P, N, H, K), dtype, seed) for seed in (2, 3))
    out, weight = gather_attention_triton.forward(q, k, v, source_BS)
    gradients = gather_attention_triton.backward(upstream, q, k, v, first, weight)
    compare([out, *gradients], lambda *x: dense_gather_attention(*x, source_BS), (q, k, v), upstream)
    assert not out[source_BS < 0].any()
    for gradient in gradients[1:]:
        assert not gradient[first.diff() == 0].any()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "X"), [(ODD_ROWS, 7), (ODD_ROWS, 300), (LONG_ROWS, 64)])
def test_maximum(rows, X, dtype):
    lengths, S, leading = rows
    B, P = len(lengths), len(lengths[0])
    patch_BS = patches_of(lengths, S, leading)
    first = first_of_patches(patch_BS, P)
    # Halves: many bytes of a patch share a maximum.
    x = (drawn((B, S, X), torch.float64, 0) * 2).round().div(2).to(dtype)
    upstream = drawn((B, P, X), dtype, 1)
    out = segment_max_triton.forward(x, first)
    gradient = segment_max_triton.backward(upstream, x, first, out)
    compare([out, gradient], lambda y: looped_segment_max(y, patch_BS, P), (x,), upstream)
    assert torch.equal(out.double(), looped_segment_max(x.double(), patch_BS, P))


def test_maximum_keeps_what_is_not_a_number():
    patch_BS = patches_of([[3, 12, 1]], 16)
    x = drawn((1, 16, 4), torch.float32, 0)
    x[0, 1, 2] = x[0, 14, 3] = torch.nan
    out = segment_max_triton.forward(x, first_of_patches(patch_BS, 3))
    assert out.isnan().nonzero().tolist() == [[0, 0, 2], [0, 1, 3]]


def test_large_scores_do_not_overflow():
    patch_BS = patches_of(ODD[:1], 37)
    first = first_of_patches(patch_BS, len(ODD[0]))
    bytes_ = drawn((1, 37, 1, 8), torch.float32, 0) * 1e3
    slots = drawn((*first[:, 1:].shape, 2, 1, 8), torch.float32, 1)
    out, lse = segment_attention_triton.forward(slots, bytes_, bytes_, first)
    made = [out, *segment_attention_triton.backward(out, slots, bytes_, bytes_, first, lse)]
    out, weight = gather_attention_triton.forward(bytes_, slots, slots, patch_BS)
    made += [out, *gather_attention_triton.backward(out, bytes_, slots, slots, first, weight)]
    for x in made:
        assert x.isfinite().all()
