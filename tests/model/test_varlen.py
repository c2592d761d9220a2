"""Documents as runs of slots: torch's operator is stood in for by its documented rule, a run at a time, on any device.

What it computes on a card is compared with SDPA there (`scripts/gpu_check.sh --stage attention`).
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.attention.varlen
from torch._subclasses.fake_tensor import FakeTensorMode

from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.documents import few_documents
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.store.errors import DataError
from blt_titan.dry_run.host_reads import HostReads
from blt_titan.dry_run.watch import Watch
from blt_titan.model import varlen
from blt_titan.model.attention import attend, causal_mask, window_mask
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.small_models import DOCUMENTS, drawn, packed, small_blt, small_entropy_model, stack_rows
from tests.helpers.tensor_watch import NoHostRead

ATOL = 2e-6
"""fp32 softmax over at most 300 keys of unit scale, summed in another order."""
MODEL_ATOL = 2e-5
"""As ATOL, through three stacks to logits of unit scale; gradients are compared to the scale of the largest."""
SHAPE = RowShape(segments=1, segment_bytes=192, segment_patches=64)


def attend_runs(q, k, v, starts_q, starts_k, most_q, most_k, *, window_size, **_):
    """What the documentation of `varlen_attn` says: each sequence alone, aligned at its end, within the window."""
    left, right = window_size
    assert right == 0
    starts_q, starts_k = starts_q.tolist(), starts_k.tolist()
    assert starts_q[0] == starts_k[0] == 0
    assert (starts_q[-1], starts_k[-1]) == (len(q), len(k))
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        assert 0 <= q1 - q0 <= most_q
        assert 0 <= k1 - k0 <= most_k
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        seen = (distance >= 0) & ((left < 0) | (distance <= left))
        scores = torch.einsum("qhk,thk->hqt", q[q0:q1], k[k0:k1]) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hqt,thk->qhk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[k0:k1]))
    return torch.cat(out)


@pytest.fixture
def by_the_rule(monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_runs)
    monkeypatch.setattr(varlen, "NUMBERS", (torch.float32,))


def documents(S: int) -> torch.Tensor:
    """One document; several, the first of one slot; two and padding; nothing but padding."""
    slot = torch.arange(S)
    many = (slot >= 1).int() + (slot >= 6).int() + (slot >= 2 * S // 3).int()
    padded = torch.where(slot < S // 2, 0, torch.where(slot < 3 * S // 4, 1, -1))
    return torch.stack([torch.zeros(S), many, padded, torch.full((S,), -1)]).int()


def test_runs_of_the_worked_example():
    doc_BS = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1]])
    assert varlen.varlen_mask(doc_BS, window=None, documents=3).starts.tolist() == [0, 3, 5, 8, 8]


@pytest.mark.parametrize("S", [7, 64, 300])
@pytest.mark.parametrize("window", [None, 1, 16, 1000])
def test_attends_as_sdpa_does(S, window, by_the_rule):
    def outputs_and_gradients(backend):
        generator = torch.Generator().manual_seed(S)
        qkv = [torch.randn(4, S, 2, 16, generator=generator).requires_grad_() for _ in range(3)]
        doc_BS = documents(S)
        if window is None:
            mask = causal_mask(doc_BS, backend=backend)
        else:
            mask = window_mask(doc_BS, window=window, backend=backend)
        out = attend(*qkv, mask)
        return [out.detach(), *torch.autograd.grad(out, qkv, torch.randn(out.shape, generator=generator))]

    for ours, sdpa in zip(outputs_and_gradients("varlen"), outputs_and_gradients("sdpa"), strict=True):
        torch.testing.assert_close(ours, sdpa, atol=ATOL, rtol=ATOL)


def rows():
    return stack_rows([packed(DOCUMENTS[:3], SHAPE), packed(DOCUMENTS[3:], SHAPE)], SHAPE)


@pytest.mark.parametrize("make", [small_blt, small_entropy_model])
def test_models_compute_what_they_do_by_sdpa(make, by_the_rule):
    def logits_and_gradients(backend):
        model = drawn(make(attention_backend=backend))
        ids_BS, _, layout = rows()
        logits = model(ids_BS, layout)
        real = layout.byte_doc_BS >= 0
        logits[real].square().mean().backward()
        return [logits.detach()[real], *(p.grad / p.grad.abs().max() for p in model.parameters())]

    for ours, sdpa in zip(logits_and_gradients("varlen"), logits_and_gradients("sdpa"), strict=True):
        torch.testing.assert_close(ours, sdpa, atol=MODEL_ATOL, rtol=MODEL_ATOL)


def test_the_host_reads_no_documents():
    with NoHostRead() as watched:
        mask = window_mask(documents(300), window=16, backend="varlen")
    assert "searchsorted" in watched.seen
    assert mask.starts.dtype == torch.int32
    # A mask has a place for each run, never one for each pair of slots.
    assert mask.starts.numel() == 4 * (varlen.DOCUMENTS + 1) + 1


def test_one_document_too_many():
    doc_BS = torch.arange(4)[None].repeat_interleave(5, dim=1)
    full = varlen.varlen_mask(doc_BS, window=None, documents=4)
    assert full.starts.tolist() == [0, 5, 10, 15, 20, 20]
    # Without padding the run that is left over takes one more.
    with pytest.raises(RuntimeError, match="more than 2 documents"):
        varlen.varlen_mask(doc_BS, window=None, documents=2)


def test_rows_of_too_many_documents_are_refused_where_they_come_from():
    batch = collate_rows([packed(DOCUMENTS[:3], SHAPE), packed(DOCUMENTS[3:], SHAPE)], SHAPE)
    assert list(few_documents([batch], 3)) == [batch]
    with pytest.raises(DataError, match=r"3 documents.*model\.varlen_documents = 2"):
        list(few_documents([batch], 2))


def test_slices_and_wide_numbers_are_refused():
    doc_BS = documents(8)
    with pytest.raises(ValueError, match="whole rows"):
        causal_mask(doc_BS, backend="varlen", queries=range(4, 8))
    with pytest.raises(ValueError, match="whole rows"):
        window_mask(doc_BS, window=4, backend="varlen", before_doc_BW=doc_BS[:, :4])
    qkv = [torch.zeros(4, 8, 2, 16)] * 3
    with pytest.raises(TypeError, match=r"bfloat16.*float32"):
        attend(*qkv, causal_mask(doc_BS, backend="varlen"))


@pytest.mark.parametrize("window", [None, 16])
def test_the_operator_takes_and_gives_what_we_do(window):
    """Torch's own operator, on tensors without data: backward too, and in one compiled graph."""
    with FakeTensorMode():
        doc_BS = torch.zeros(2, 64, dtype=torch.int32)
        qkv = [torch.empty(2, 64, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        mask = varlen.varlen_mask(doc_BS, window=window, documents=4)
        out = attend(*qkv, mask)
        grads = torch.autograd.grad(out, qkv, torch.empty_like(out))
    for made in (out, *grads):
        assert (made.shape, made.dtype) == (qkv[0].shape, torch.bfloat16)


def test_a_compiled_block_is_one_graph():
    torch._dynamo.reset()
    mask = varlen.varlen_mask(documents(64), window=16, documents=4)
    seen = []

    def keep(module, _):
        seen.append([str(node.target) for node in module.graph.nodes])
        return lambda q, *_: (torch.zeros_like(q),)

    compiled = torch.compile(lambda *qkv: attend(*qkv, mask), backend=keep, fullgraph=True, dynamic=False)
    compiled(*(torch.zeros(4, 64, 2, 16, dtype=torch.bfloat16) for _ in range(3)))
    (graph,) = seen
    assert any("_varlen_attn" in target for target in graph)


@pytest.mark.parametrize("make", [small_blt, small_entropy_model])
def test_a_forward_on_cuda_reads_nothing(make, tmp_path):
    model = make(attention_backend="varlen").bfloat16()
    ids_BS, _, layout = rows()
    reads = HostReads()
    watch = Watch([reads])
    reads.watch = watch
    with fake_cuda(tmp_path):
        model = model.to("cuda")
        watch.follow(model)
        ids_BS, layout = ids_BS.to("cuda"), layout.map(lambda tensor: tensor.to("cuda"))
        with watch, watch.at(phase="forward"):
            logits = model(ids_BS, layout)
    assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)
    assert reads.found() == []
