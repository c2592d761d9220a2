"""Windowed and causal attention against a dense masked softmax; FlexAttention's block lists against the dense rule."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from blt_titan.model import block_local
from blt_titan.model import flex as flex_attends
from blt_titan.model.attention import BlockLocalMask, attend, causal_mask, window_mask
from blt_titan.model.block_local import attend_in_blocks
from blt_titan.model.flex import FLEX_BLOCK, FlexVariantsError
from tests.helpers.tensor_watch import LargestTensor, NoHostRead

CPU_ATOL = 2e-6
"""fp32 softmax over at most 300 keys of unit scale, summed in another order."""
GPU_ATOL = 2e-5
"""fp32 on another device: other kernels, exp2 instead of exp, sums by tiles."""
GPU_GRADIENT_ATOL = 1e-4
"""As GPU_ATOL, through the backward's longer sums over queries."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="run on a machine with a CUDA device")


def dense_visible(doc_BS, window=None):
    """The rule itself, [B, S, S]."""
    slot = torch.arange(doc_BS.shape[1], device=doc_BS.device)
    back = slot[:, None] - slot
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    return near & (doc_BS[:, :, None] == doc_BS[:, None, :])


def dense_attention(q, k, v, visible_BSS):
    """Masked softmax from its definition, [B, S, H, K]."""
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible_BSS[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqs,bshk->bqhk", weights, v)


def documents(S: int) -> torch.Tensor:
    """Three rows: one document; several, of lengths 1, 5, ...; two and a padded end."""
    one = torch.zeros(S)
    many = (torch.arange(S) >= 1).int() + (torch.arange(S) >= 6).int() + (torch.arange(S) >= 2 * S // 3).int()
    padded = torch.where(torch.arange(S) < S // 2, 0, torch.where(torch.arange(S) < 3 * S // 4, 1, -1))
    return torch.stack([one, many, padded]).int()


def leaves(B, S, H=2, K=16, device="cpu"):
    generator = torch.Generator().manual_seed(S)
    return [torch.randn(B, S, H, K, generator=generator).to(device).requires_grad_() for _ in range(3)]


def upstream_like(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)


def outputs_and_gradients(fn, qkv):
    out = fn(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream_like(out))]


WINDOWED = [(64, 16), (64, 13), (61, 16), (61, 13), (10, 16), (16, 16), (17, 16), (40, 1), (1, 4), (33, 2)]


@pytest.mark.parametrize(("S", "window"), WINDOWED)
def test_window_attention_equals_dense(S, window):
    doc_BS = documents(S)
    qkv = leaves(3, S)
    mask = window_mask(doc_BS, window=window)
    assert isinstance(mask, BlockLocalMask)
    ours = outputs_and_gradients(lambda *qkv: attend(*qkv, mask), qkv)
    dense = outputs_and_gradients(lambda *qkv: dense_attention(*qkv, dense_visible(doc_BS, window)), qkv)
    for name, got, expected in zip(("out", "dq", "dk", "dv"), ours, dense, strict=True):
        torch.testing.assert_close(got, expected, atol=CPU_ATOL, rtol=CPU_ATOL, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("S", "window"), WINDOWED)
def test_windows_on_other_devices_than_a_cpu(S, window, monkeypatch):
    """What "sdpa" does on CUDA, run here: the same blocks through the public function."""
    doc_BS = documents(S)
    bias = window_mask(doc_BS, window=window).bias

    def ours(*qkv):
        with monkeypatch.context() as patch:
            patch.setattr(block_local, "_runs_on_cpu", lambda x: False)
            return attend_in_blocks(*qkv, bias)

    dense = outputs_and_gradients(lambda *qkv: dense_attention(*qkv, dense_visible(doc_BS, window)), leaves(3, S))
    for got, expected in zip(outputs_and_gradients(ours, leaves(3, S)), dense, strict=True):
        torch.testing.assert_close(got, expected, atol=CPU_ATOL, rtol=CPU_ATOL)


@pytest.mark.parametrize("S", [1, 40])
def test_causal_attention_equals_dense(S):
    doc_BS = documents(S)
    qkv = leaves(3, S)
    ours = outputs_and_gradients(lambda *qkv: attend(*qkv, causal_mask(doc_BS)), qkv)
    dense = outputs_and_gradients(lambda *qkv: dense_attention(*qkv, dense_visible(doc_BS)), qkv)
    for got, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(got, expected, atol=CPU_ATOL, rtol=CPU_ATOL)


def test_window_attention_never_holds_S_x_S():
    S, window = 4096, 64
    doc_BS = (torch.arange(S) // 1500)[None]
    qkv = leaves(1, S, H=2, K=8)
    with LargestTensor() as made:
        mask = window_mask(doc_BS, window=window)
        # Their implementations: inside of an operator the watch sees nothing.
        with torch.no_grad():
            given = (*qkv, *mask.bias)
            out, *sums = block_local.window_attention._init_fn(*given)
            block_local.window_attention_backward._init_fn(upstream_like(out), *given, out, *sums)
    assert any("backward" in name for name in made.seen), "the backward was not watched"
    assert made.numel < S * S / 2
    assert not [shape for shape in made.shapes if sum(size >= S for size in shape) > 1]


def test_the_watch_sees_a_dense_mask():
    with LargestTensor() as made:
        causal_mask(torch.zeros(1, 256), backend="sdpa")
    assert made.numel >= 256 * 256
    assert any(sum(size >= 256 for size in shape) > 1 for shape in made.shapes)


def listed_blocks(num_blocks, indices) -> torch.Tensor:
    """Decode block lists [B, 1, N], [B, 1, N, M] to bool [B, N, M]: list i names block j."""
    B, _, N = num_blocks.shape
    listed = torch.zeros(B, N, indices.shape[-1], dtype=torch.bool)
    for b in range(B):
        for i in range(N):
            names = indices[b, 0, i, : num_blocks[b, 0, i]].tolist()
            assert len(names) == len(set(names)), "a block is listed twice"
            listed[b, i, names] = True
    return listed


def check_block_mask(mask: BlockMask, visible_BQS: torch.Tensor):
    """The mask function is the rule, and every visible pair lies in a listed block, seen from keys and from queries."""
    B, Q, S = visible_BQS.shape
    b, q, kv = torch.arange(B)[:, None, None], torch.arange(Q)[:, None], torch.arange(S)
    assert torch.equal(mask.mask_mod(b, torch.tensor(0), q, kv), visible_BQS)
    assert mask.seq_lengths == (Q, S)
    assert mask.BLOCK_SIZE == (FLEX_BLOCK, FLEX_BLOCK)
    masked, full = both_lists(mask)
    padded = F.pad(visible_BQS, (0, -S % FLEX_BLOCK, 0, -Q % FLEX_BLOCK))
    tiles = padded.unflatten(2, (-1, FLEX_BLOCK)).unflatten(1, (-1, FLEX_BLOCK))
    needed, whole = tiles.any(4).any(2), tiles.all(4).all(2)
    assert torch.equal(full & ~whole, torch.zeros_like(full)), "a block that is not masked has a pair that is not seen"
    assert not (needed & ~(masked | full)).any(), "a visible pair lies in no listed block"
    assert torch.equal(listed_blocks(mask.q_num_blocks, mask.q_indices), masked.transpose(1, 2))
    assert torch.equal(listed_blocks(mask.full_q_num_blocks, mask.full_q_indices), full.transpose(1, 2))
    # Within a document, every tile of visible pairs skips the mask function.
    assert torch.equal(full, whole)
    return masked | full, needed


def both_lists(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles are masked inside, and which are read whole, bool [B, N, M]; none is both."""
    masked = listed_blocks(mask.kv_num_blocks, mask.kv_indices)
    full = listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (masked & full).any()
    return masked, full


@pytest.mark.parametrize("S", [128, 512, 640, 100, 513, 700])
@pytest.mark.parametrize("window", [1, 2, 64, 128, 129, 130, 512, 2000])
def test_flex_window_mask(S, window):
    doc_BS = documents(S)
    with NoHostRead():
        mask = window_mask(doc_BS, window=window, backend="flex")
    listed, _ = check_block_mask(mask, dense_visible(doc_BS, window))
    # The W - 1 predecessors of a tile's first query reach into at most this many tiles before it.
    assert listed.sum(-1).max() <= 1 + -(-(window - 1) // FLEX_BLOCK)
    # One document and full rows: not a tile more than needed.
    exact_listed, exact_needed = check_block_mask(
        window_mask(doc_BS[:1], window=window, backend="flex"), dense_visible(doc_BS[:1], window)
    )
    assert torch.equal(exact_listed, exact_needed)


@pytest.mark.parametrize("S", [128, 512, 640, 100, 513, 700])
def test_flex_causal_mask(S):
    doc_BS = documents(S)
    with NoHostRead():
        mask = causal_mask(doc_BS, backend="flex")
    listed, needed = check_block_mask(mask, dense_visible(doc_BS))
    # A tile's list begins with the document of its first query, so documents do cut it short.
    assert torch.equal(listed, needed)
    if S > 3 * FLEX_BLOCK:
        assert listed[1].sum() < listed[0].sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("S", [256, 200])
def test_flex_computes_what_sdpa_does(S):
    """Uncompiled FlexAttention on the CPU: slow and dense, but it runs the same mask function."""
    doc_BS = documents(S)
    qkv = leaves(3, S)
    for of in (
        lambda backend: window_mask(doc_BS, window=40, backend=backend),
        lambda b: causal_mask(doc_BS, backend=b),
    ):
        block_mask = of("flex")
        q, k, v = (x.detach().transpose(1, 2) for x in qkv)
        flex = flex_attention(q, k, v, block_mask=block_mask).transpose(1, 2)
        torch.testing.assert_close(flex, attend(*qkv, of("sdpa")).detach(), atol=CPU_ATOL, rtol=CPU_ATOL)


def test_flex_takes_queries_and_keys_where_they_lie(monkeypatch):
    """Views of what the projections wrote: a copy would be one more kernel for each of q, k and v in each layer."""
    q, k, v = (x.detach() for x in leaves(1, 256))
    taken = []

    def look(*qkv, **_):
        taken.extend(qkv)
        return qkv[0]

    monkeypatch.setattr(flex_attends, "_attend_fused", look)
    attend(q, k, v, window_mask(documents(256)[:1], window=40, backend="flex"))
    assert [x.data_ptr() for x in taken] == [x.data_ptr() for x in (q, k, v)]


SLICES = [(64, 20, 16, 16), (64, 40, 24, 16), (64, 16, 48, 16), (50, 33, 9, 16), (50, 15, 7, 16), (40, 20, 20, 1)]


@pytest.mark.parametrize(("S", "begin", "size", "window"), SLICES)
def test_windows_of_a_slice_equal_those_of_the_row(S, begin, size, window):
    """A slice with the W - 1 keys before it gives its part of the row: outputs, and gradients of all that it saw."""
    doc_BS = documents(S)
    q, k, v = leaves(3, S)
    own, seen = slice(begin, begin + size), slice(begin - (window - 1), begin + size)
    mask = window_mask(doc_BS[:, own], window=window, before_doc_BW=doc_BS[:, begin - (window - 1) : begin])
    ours = outputs_and_gradients(lambda q, k, v: attend(q[:, own], k[:, seen], v[:, seen], mask), (q, k, v))
    visible = dense_visible(doc_BS, window)[:, own]
    dense = outputs_and_gradients(lambda q, k, v: dense_attention(q[:, own], k, v, visible), (q, k, v))
    real = doc_BS[:, own] >= 0  # padding sees padding of the window, whatever the row holds before it
    for got, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(got, expected, atol=CPU_ATOL, rtol=CPU_ATOL)
    assert real.any()


@pytest.mark.parametrize("S", [128, 300])
@pytest.mark.parametrize("window", [1, 64, 130, 200])
def test_flex_window_mask_of_a_slice(S, window):
    begin = 230
    doc_BS = documents(begin + S)
    own, seen = slice(begin, begin + S), slice(begin - (window - 1), begin + S)
    before_doc_BW = doc_BS[:, begin - (window - 1) : begin]
    with NoHostRead():
        mask = window_mask(doc_BS[:, own], window=window, backend="flex", before_doc_BW=before_doc_BW)
    listed, _ = check_block_mask(mask, dense_visible(doc_BS, window)[:, own, seen])
    assert listed.sum(-1).max() <= 2 + -(-(window - 1) // FLEX_BLOCK)


def rows_of_slices(slots: int, slices: int) -> torch.Tensor:
    """Documents that cross slices, padding at the end of each: one row full, one ragged, one that ends early."""
    ragged, ends_early = [slots - 7 * (c + 1) for c in range(slices)], [4 * slots // 5, *[0] * (slices - 1)]
    rows = []
    for counts in ([slots] * slices, ragged, ends_early):
        position = 0
        row = torch.full((slices, slots), -1)
        for c, count in enumerate(counts):
            row[c, :count] = torch.arange(position, position + count) // (slots * slices // 3)
            position += count
        rows.append(row.flatten())
    return torch.stack(rows).int()


@pytest.mark.parametrize("part", [range(0, 200), range(200, 400), range(600, 800), range(0, 800)], ids=str)
def test_causal_masks_of_a_part_of_the_row(part):
    doc_BS = rows_of_slices(200, 4)
    visible = dense_visible(doc_BS)[:, part.start : part.stop]
    dense = causal_mask(doc_BS, backend="sdpa", queries=part)
    assert torch.equal(dense.bias[:, 0] == 0, visible)
    with NoHostRead():
        mask = causal_mask(doc_BS, backend="flex", queries=part)
    # A padded query needs no key of another slice's padding.
    needed = visible & (doc_BS[:, part.start : part.stop, None] >= 0)
    masked, full = both_lists(mask)
    listed = masked | full
    padded = F.pad(needed, (0, -800 % FLEX_BLOCK, 0, -len(part) % FLEX_BLOCK))
    tiles = padded.unflatten(2, (-1, FLEX_BLOCK)).unflatten(1, (-1, FLEX_BLOCK)).any(4).any(2)
    assert not (tiles & ~listed).any(), "a visible pair lies in no listed block"
    assert listed.any(-1).all(), "a tile without keys would give NaN"
    b, q, kv = torch.arange(3)[:, None, None], torch.arange(len(part))[:, None], torch.arange(800)
    assert torch.equal(mask.mask_mod(b, torch.tensor(0), q, kv), visible)
    if part.start:
        # The row that ends early, after 160 slots: a tile of padding reads padding, not the document before it.
        assert not listed[2, :, : 160 // FLEX_BLOCK].any()


def test_unknown_backends_and_masks_are_refused():
    doc_BS = documents(8)
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        window_mask(doc_BS, window=4, backend="fast")
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        causal_mask(doc_BS, backend="fast")
    with pytest.raises(TypeError, match="Tensor"):
        attend(*leaves(3, 8), torch.ones(8, 8))


@pytest.fixture
def eager_kernels(monkeypatch):
    """FlexAttention compiled as on CUDA up to the kernels, two variants of it at most."""
    compiled = partial(torch.compile, backend="eager")
    fresh = cache(flex_attends._compiled_flex_attention.__wrapped__)
    monkeypatch.setattr(flex_attends, "_compiled_flex_attention", fresh)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(flex_attends, "FLEX_VARIANTS", 2)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_variant_of_flex_too_many_is_an_error(eager_kernels):
    def attended(S):
        q, k, v = (x.detach() for x in leaves(3, S))
        return attend(q, k, v, window_mask(documents(S), window=40, backend="flex"))

    for S in (256, 200, 256, 200):
        attended(S)
    with pytest.raises(FlexVariantsError, match=r"2 combinations .* \[3, 2, 300, 16\] .* attention_backend = 'sdpa'"):
        attended(300)
    # Those that were compiled still are.
    qkv = [x.detach() for x in leaves(3, 200)]
    expected = attend(*qkv, window_mask(documents(200), window=40))
    torch.testing.assert_close(attended(200), expected, atol=CPU_ATOL, rtol=CPU_ATOL)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("S", [256, 300])
@pytest.mark.parametrize("window", [64, 130, None], ids=["window_64", "window_130", "causal"])
def test_flex_on_cuda_equals_sdpa_on_cpu(S, window):
    def attention_on(device):
        doc_BS = documents(S).to(device)
        mask = causal_mask(doc_BS) if window is None else window_mask(doc_BS, window=window)
        assert isinstance(mask, BlockMask) == (device == "cuda")
        return outputs_and_gradients(lambda *qkv: attend(*qkv, mask), leaves(3, S, K=32, device=device))

    cpu, cuda = attention_on("cpu"), attention_on("cuda")
    for i, (expected, got) in enumerate(zip(cpu, cuda, strict=True)):
        torch.testing.assert_close(got.cpu(), expected, atol=GPU_GRADIENT_ATOL if i else GPU_ATOL, rtol=GPU_ATOL)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["window", "causal"])
def test_flex_on_cuda_equals_sdpa_on_cpu_for_a_slice(kind):
    """More keys than queries: the W - 1 before a slice, or the patches of the whole row."""
    begin, size, window = 230, 300, 130

    def attention_on(device):
        if kind == "window":
            doc_BS = documents(begin + size).to(device)
            before_doc_BW = doc_BS[:, begin - (window - 1) : begin]
            mask = window_mask(doc_BS[:, begin:], window=window, before_doc_BW=before_doc_BW)
            n_queries, n_keys = size, window - 1 + size
        else:
            mask = causal_mask(rows_of_slices(200, 4).to(device), queries=range(400, 600))
            n_queries, n_keys = 200, 800
        q, _, _ = leaves(3, n_queries, K=32, device=device)
        _, k, v = leaves(3, n_keys, K=32, device=device)
        return outputs_and_gradients(lambda *qkv: attend(*qkv, mask), (q, k, v))

    cpu, cuda = attention_on("cpu"), attention_on("cuda")
    for i, (expected, got) in enumerate(zip(cpu, cuda, strict=True)):
        torch.testing.assert_close(got.cpu(), expected, atol=GPU_GRADIENT_ATOL if i else GPU_ATOL, rtol=GPU_ATOL)
