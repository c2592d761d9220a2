"""The operators on the CPU: values and gradients against dense masks and loops in fp64, and as nodes of a graph."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from blt_titan.model.kernels import gather_attention as gather
from blt_titan.model.kernels import segment_attention as segment
from blt_titan.model.kernels import segment_max as maximum
from tests.helpers.byte_runs import FP64_ATOL, ROWS, TOLERANCES, case, check_attention, looped_segment_max


@pytest.mark.parametrize(("H", "K", "N"), [(2, 32, 1), (3, 64, 2), (1, 5, 4), (2, 8, 3)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("op", ["segment", "gather"])
def test_attention_equals_a_dense_mask(op, rows, H, K, N):
    for dtype in TOLERANCES:
        check_attention(op, rows, H, K, N, dtype)


@pytest.mark.parametrize("op", ["segment", "gather"])
def test_nothing_to_see_is_exactly_zero(op):
    patch_BS, first, (b0, b1, _), (s0, s1, _) = case("led", 2, 8, 2)
    if op == "segment":
        inputs, nothing = (s0, b0, b1), first.diff() == 0
        out = segment.segment_attention(*inputs, first)
    else:
        inputs, nothing = (b0, s0, s1), patch_BS < 0
        out = gather.gather_attention(*inputs, patch_BS, first)
    assert nothing.any()
    assert not out[nothing].any()
    for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        alone = first.diff() == 0 if x.ndim == 5 else patch_BS < 0
        assert not grad[alone].any()
        assert grad.isfinite().all()


@pytest.mark.parametrize("op", ["segment", "gather"])
def test_large_scores_do_not_overflow(op):
    patch_BS, first, (b0, b1, _), (s0, s1, _) = case("odd", 2, 8, 2, torch.float32)
    with torch.no_grad():
        b0 *= 1e3
    if op == "segment":
        out = segment.segment_attention(s0, b0, b1, first)
    else:
        out = gather.gather_attention(b0, s0, s1, patch_BS, first)
    for x in (out, *torch.autograd.grad(out.sum(), (b0, s0))):
        assert x.isfinite().all()


@pytest.mark.parametrize("rows", ROWS)
def test_maximum_equals_loops_with_ties(rows):
    patch_BS, first, (x, *_), _ = case(rows, 1, 7, 1)
    # Quarters: many bytes of a patch share a maximum.
    x_BSX = (x.detach().flatten(2) * 2).round().div(2).requires_grad_()
    ours, looped = maximum.segment_max(x_BSX, first), looped_segment_max(x_BSX, patch_BS, first.shape[1] - 1)
    assert torch.equal(ours, looped)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, expected = (torch.autograd.grad(out, x_BSX, upstream)[0] for out in (ours, looped))
    # Shares are made in fp64 here, by one division.
    torch.testing.assert_close(got, expected, atol=FP64_ATOL, rtol=0)


def test_gradients_are_those_of_differences():
    patch_BS, first, (b0, b1, _), (s0, s1, _) = case("led", 1, 3, 2)
    inputs = [x[:2].detach().clone().requires_grad_() for x in (b0, b1, s0, s1)]
    b0, b1, s0, s1 = inputs
    patch_BS, first = patch_BS[:2], first[:2]
    assert torch.autograd.gradcheck(lambda *x: segment.segment_attention(*x, first), (s0, b0, b1))
    assert torch.autograd.gradcheck(lambda *x: gather.gather_attention(*x, patch_BS, first), (b0, s0, s1))
    assert torch.autograd.gradcheck(lambda x: maximum.segment_max(x, first), (b0.flatten(2),))


def operators():
    patch_BS, first, (b0, b1, _), (s0, s1, _) = case("led", 2, 8, 2, torch.float32)
    return {
        "segment": (segment._segment_attention, segment.segment_attention, (s0, b0, b1, first)),
        "gather": (gather._gather_attention, gather.gather_attention, (b0, s0, s1, patch_BS, first)),
        "max": (maximum._segment_max, maximum.segment_max, (b0.detach().flatten(2).requires_grad_(), first)),
    }


@pytest.mark.parametrize("name", ["segment", "gather", "max"])
def test_operators_are_registered_soundly(name):
    operator, _, args = operators()[name]
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("name", ["segment", "gather", "max"])
def test_compile_sees_one_node(name):
    _, function, args = operators()[name]
    floating = [x for x in args if x.is_floating_point()]
    compiled = torch.compile(lambda *x: function(*x) * 2, fullgraph=True, dynamic=False, backend="aot_eager")
    eager, graph = function(*args) * 2, compiled(*args)
    assert torch.equal(eager, graph)
    for a, b in zip(
        torch.autograd.grad(eager.square().sum(), floating),
        torch.autograd.grad(graph.square().sum(), floating),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["segment", "gather", "max"])
def test_checkpointing_gives_the_same_gradients(name):
    _, function, args = operators()[name]
    floating = [x for x in args if x.is_floating_point()]
    plain = torch.autograd.grad(function(*args).square().sum(), floating)
    again = torch.autograd.grad(checkpoint(function, *args, use_reentrant=False).square().sum(), floating)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["segment", "gather"])
def test_autocast_projections_go_in_and_out_as_bf16(name):
    _, function, (q, k, v, *indices) = operators()[name]
    linear = torch.nn.Linear(8, 8, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(linear(q), linear(k), linear(v), *indices)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.any()


@pytest.mark.parametrize("name", ["segment", "gather"])
def test_backward_keeps_inputs_and_a_number_per_pair(name):
    """Nothing as large as the slots of every byte, [B, S, k, d], which is what a gather would keep."""
    _, function, args = operators()[name]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*args)
    extra = [x for x in kept.values() if not any(x.data_ptr() == given.data_ptr() for given in args)]
    (B, S, H, _), N = next(x for x in args if x.ndim == 4).shape, 2
    assert out.grad_fn is not None
    assert len(extra) == 1
    assert extra[0].numel() <= B * S * H * N


@pytest.mark.parametrize("name", ["segment", "gather", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fake_tensors_on_cuda_need_no_triton(name, dtype):
    """Shapes and dtypes of a GPU's forward, where there is none."""
    _, function, args = operators()[name]
    with FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device="cuda") for x in args]
        out = function(*fakes)
    assert out.dtype == dtype
    assert out.device.type == "cuda"
    assert out.shape == function(*args).shape


def test_inputs_that_do_not_fit_are_refused():
    patch_BS, first, (b0, b1, _), (s0, s1, _) = case("odd", 2, 8, 2, torch.float32)
    for call, says in (
        (lambda: segment.segment_attention(s0, b0, b1[:, :-1], first), "values be shaped as keys"),
        (lambda: segment.segment_attention(s0, b0, b1.double(), first), "share a floating dtype"),
        (lambda: segment.segment_attention(s0, b0, b1, first.long()), "first_BP1 must be int32"),
        (lambda: segment.segment_attention(b0, s0[:, :, 0], s1[:, :, 0], first), "slots of patches"),
        (lambda: gather.gather_attention(b0, s0, s1, patch_BS[:, 1:], first), "source_BS must be int32"),
        (lambda: gather.gather_attention(b0, s0, s1, patch_BS, first[:, 1:]), "first_reader_BP1 must be int32"),
        (lambda: maximum.segment_max(b0, first), "must be .B, S, X."),
        (lambda: maximum.segment_max(b0.flatten(2), first[:1]), "first_BP1 must be int32"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
