"""Cross-attention by index against a dense-mask twin: outputs, every gradient, empty patches, padded bytes, memory."""

import pytest
import torch

from blt_titan.model.attention import attend, window_mask
from blt_titan.model.cross_attention import BytesReadPatches, PatchesReadBytes, patch_runs
from blt_titan.model.layers import rotary_angles
from tests.helpers.small_models import small_blt
from tests.helpers.tensor_watch import LargestTensor

ATOL = 5e-6
"""fp32 softmax over at most 30 keys and projections of width 32, summed in another order."""

DIM, HEADS = 32, 4


def dense_cross_attention(module, query_BQd, source_BSd, visible_BQS):
    """Masked softmax over all keys; a query that sees nothing gets 0. Returns queries + attention, [B, Q, d]."""
    normed = module.kv_norm(source_BSd)
    q, k, v = module.wq(module.q_norm(query_BQd)), module.wk(normed), module.wv(normed)
    q, k, v = (x.unflatten(-1, (module.n_heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) * q.shape[-1] ** -0.5
    # The fill is finite, so that the softmax of a row with nothing to see has finite gradients; then it counts 0.
    visible_BHQS = visible_BQS[:, None]
    weights = scores.masked_fill(~visible_BHQS, -1e30).softmax(-1) * visible_BHQS
    return query_BQd + module.wo(torch.einsum("bhqs,bshk->bqhk", weights, v).flatten(2))


def drawn_module(cls, k):
    module = cls(DIM, HEADS, k)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=1.5 * DIM**-0.5, generator=generator)
    return module


def indices() -> torch.Tensor:
    """Patch of each byte, [3, 30], 8 patches: ragged and full; with a patch of 1 and of 15; with padding, -1."""
    full = torch.repeat_interleave(torch.arange(8), torch.tensor([1, 3, 7, 2, 5, 6, 4, 2]))
    uneven = torch.repeat_interleave(torch.arange(8), torch.tensor([1, 15, 1, 1, 3, 3, 3, 3]))
    padded = torch.cat([full[:19], torch.full((11,), -1)])
    return torch.stack([full, uneven, padded])


def check_equal(module, ours, dense, inputs, upstream):
    torch.testing.assert_close(ours, dense, atol=ATOL, rtol=ATOL)
    wanted = [*inputs, *module.parameters()]
    names = ["queries", "source", *(name for name, _ in module.named_parameters())]
    for name, got, expected in zip(
        names, torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(dense, wanted, upstream), strict=True
    ):
        scale = expected.abs().max()
        assert scale > 0, name
        error = (got - expected).abs().max()
        assert error <= 4 * ATOL * max(scale, 1), f"{name}: error {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("k", [2, 4])
def test_patches_read_bytes_as_a_dense_mask_says(k):
    generator = torch.Generator().manual_seed(1)
    patch_BS = indices()
    B, S, P = *patch_BS.shape, 8
    module = drawn_module(PatchesReadBytes, k)
    patches = torch.randn(B, P, k, DIM, generator=generator, requires_grad=True)
    bytes_ = torch.randn(B, S, DIM, generator=generator, requires_grad=True)
    upstream = torch.randn(B, P, k, DIM, generator=generator)
    ours = module(patches, bytes_, patch_runs(patch_BS, P))
    visible = (torch.arange(P)[:, None] == patch_BS[:, None, :]).repeat_interleave(k, dim=1)
    dense = dense_cross_attention(module, patches.flatten(1, 2), bytes_, visible).unflatten(1, (P, k))
    check_equal(module, ours, dense, (patches, bytes_), upstream)
    # The third row's last patches have no bytes: their attention is exactly 0.
    empty = ~visible.any(-1).unflatten(1, (P, k))[:, :, 0]
    assert empty.sum() == 2
    assert torch.equal(ours[empty], patches[empty])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_bytes_read_patches_as_a_dense_mask_says(k):
    generator = torch.Generator().manual_seed(1)
    source_BS = indices()
    B, S, P = *source_BS.shape, 8
    module = drawn_module(BytesReadPatches, k)
    patches = torch.randn(B, P, k, DIM, generator=generator, requires_grad=True)
    bytes_ = torch.randn(B, S, DIM, generator=generator, requires_grad=True)
    upstream = torch.randn(B, S, DIM, generator=generator)
    ours = module(bytes_, patches, patch_runs(source_BS, P))
    visible = (source_BS[:, :, None] == torch.arange(P)).repeat_interleave(k, dim=2)
    dense = dense_cross_attention(module, bytes_, patches.flatten(1, 2), visible)
    if k > 1:
        check_equal(module, ours, dense, (bytes_, patches), upstream)
    else:
        # A softmax over one slot is 1: queries and keys have no gradient to compare.
        torch.testing.assert_close(ours, dense, atol=ATOL, rtol=ATOL)
    padded = source_BS < 0
    assert padded.any()
    assert torch.equal(ours[padded], bytes_[padded])


def test_large_scores_do_not_overflow():
    """Scores far above exp's range: the peak of each patch is taken off first."""
    patch_BS = indices()
    module = drawn_module(PatchesReadBytes, 2)
    with torch.no_grad():
        module.q_norm.weight.fill_(500.0)
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(3, 8, 2, DIM, generator=generator, requires_grad=True)
    bytes_ = torch.randn(3, 30, DIM, generator=generator, requires_grad=True)
    out = module(patches, bytes_, patch_runs(patch_BS, 8))
    out.sum().backward()
    for tensor in (out, patches.grad, bytes_.grad, *(p.grad for p in module.parameters())):
        assert tensor.isfinite().all()


def test_padded_bytes_send_and_receive_no_gradient():
    patch_BS = indices()
    padded = patch_BS < 0
    generator = torch.Generator().manual_seed(1)
    bytes_ = torch.randn(3, 30, DIM, generator=generator, requires_grad=True)
    patches = torch.randn(3, 8, 2, DIM, generator=generator, requires_grad=True)
    drawn_module(PatchesReadBytes, 2)(patches, bytes_, patch_runs(patch_BS, 8)).sum().backward()
    assert not bytes_.grad[padded].any()
    assert bytes_.grad[~padded].any(-1).all()
    patches.grad = None
    out = drawn_module(BytesReadPatches, 2)(bytes_, patches, patch_runs(patch_BS, 8))
    out[padded].sum().backward()
    assert not patches.grad.any()


def encode(encoder, patch_BS, P, h_seed=0):
    B, S = patch_BS.shape
    ids_BS = torch.randint(4, 260, (B, S), generator=torch.Generator().manual_seed(h_seed))
    hashed = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(h_seed + 1))
    doc_BS = torch.where(patch_BS < 0, -1, 0)
    rotation = rotary_angles(torch.arange(S).expand(B, S), head_dim=16, theta=5e5)
    attends = [attend] * len(encoder.layers)
    return encoder(ids_BS, hashed, patch_BS, P, rotation, window_mask(doc_BS, window=8), attends)


@pytest.mark.parametrize("global_dim", [64, 96], ids=["same_width", "projected"])
def test_the_state_of_an_empty_patch_is_exactly_zero(global_dim):
    model = small_blt(global_dim=global_dim)
    patch_BS = indices()
    (*_, h_BSd), p_BPG = encode(model.encoder, patch_BS, P=10)
    empty = torch.zeros(3, 10, dtype=torch.bool)
    empty[:, 8:] = True
    empty[2, 6:] = True
    assert not p_BPG[empty].any()
    assert p_BPG[~empty].any(-1).all()
    (p_BPG.sum() + h_BSd.sum()).backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("cls", [PatchesReadBytes, BytesReadPatches])
def test_no_tensor_of_patches_by_bytes(cls):
    S, P, k, dim = 1024, 512, 4, 16
    module = cls(dim, 2, k)
    patches = torch.randn(1, P, k, dim, requires_grad=True)
    bytes_ = torch.randn(1, S, dim, requires_grad=True)
    runs = patch_runs(torch.arange(S)[None] // 2, P)
    with LargestTensor() as made:
        out = module(patches, bytes_, runs) if cls is PatchesReadBytes else module(bytes_, patches, runs)
        out.sum().backward()
    assert any("attention_backward" in name for name in made.seen), "the backward was not watched"
    # A few features per byte and slot, and nothing quadratic: P * S alone would be 524,288.
    assert made.numel <= 2 * S * k * dim < P * S
