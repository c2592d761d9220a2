"""The kernels where they belong; run by `scripts/gpu_check.sh`."""

import pytest
import torch

from blt_titan.model.kernels.gather_attention import gather_attention
from blt_titan.model.kernels.segment_attention import segment_attention
from blt_titan.model.kernels.segment_max import segment_max
from tests.helpers.byte_runs import ROWS, TOLERANCES, case, check_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="run on a machine with a CUDA device"),
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("H", "K", "N"), [(4, 32, 1), (16, 64, 2), (2, 128, 4), (3, 5, 3)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("op", ["segment", "gather"])
def test_attention_equals_a_dense_mask(op, rows, H, K, N, dtype):
    check_attention(op, rows, H, K, N, dtype, "cuda")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", ROWS)
def test_maximum_equals_the_twin_and_keeps_its_ties(rows, dtype):
    results = []
    for device in ("cpu", "cuda"):
        _, first, (x, *_), _ = case(rows, 4, 75, 1, device=device)
        # Halves: many bytes of a patch share a maximum.
        x_BSX = (x.detach().flatten(2) * 2).round().div(2).to(dtype).requires_grad_()
        out = segment_max(x_BSX, first)
        results.append((out.cpu(), torch.autograd.grad(out.square().sum(), x_BSX)[0].cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, **TOLERANCES[dtype])


@pytest.mark.parametrize("op", ["segment", "gather"])
def test_two_runs_give_the_same_bits(op):
    """No sum depends on which program comes first."""
    patch_BS, first, (b0, b1, _), (s0, s1, _) = case("long", 16, 64, 2, torch.bfloat16, "cuda")
    runs = []
    for _ in range(2):
        if op == "segment":
            inputs, out = (s0, b0, b1), segment_attention(s0, b0, b1, first)
        else:
            inputs, out = (b0, s0, s1), gather_attention(b0, s0, s1, patch_BS, first)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
