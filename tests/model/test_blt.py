"""What the whole model may know and must not depend on: causality, packing, padding, segments, devices."""

import pytest
import torch
import torch.nn.functional as F

from blt_titan.batch import IGNORE_LABEL, PADDING, PatchLayout, SliceLayout
from blt_titan.byte_vocab import BYTE_OFFSET, EOS_ID, VOCAB_SIZE, document_ids
from blt_titan.data.rows.packing import RowShape, empty_row
from blt_titan.model.blt import BLT
from tests.helpers.small_models import (
    DOCUMENTS,
    batch_by_spaces,
    documents_by_spaces,
    packed,
    small_blt,
    space_lengths,
    stack_rows,
)
from tests.helpers.tensor_watch import NoHostRead

LOGITS_ATOL = 1e-5
"""fp32, logits of order 1: sums over other shapes and RoPE at other positions; a leak shows above 1e-3."""
LEAK = 1e-4
"""A change that a byte must notice moves some logit by more than this."""
GPU_LOGITS_ATOL = 2e-4
"""fp32 through three stacks of other kernels on CUDA."""
GPU_GRADIENT_RTOL = 1e-3
"""Per parameter, error norm over gradient norm, fp32 on CUDA against the CPU."""

CHANGES = [
    {},
    dict(encoder_layers=2, encoder_cross_attn_all_layers=True),
    dict(decoder_cross_attn_all_layers=False, global_dim=96, cross_attn_k=4),
]
every_shape = pytest.mark.parametrize("changes", CHANGES, ids=["last_all", "all_layers", "first_only_projected"])

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="run on a machine with a CUDA device")


def text_ids() -> torch.Tensor:
    """Ids of three whole documents and the beginning of a fourth, [100]."""
    return torch.cat([torch.from_numpy(document_ids(document)) for document in DOCUMENTS])[:100].int()


def other_byte(id_: int) -> int:
    """Another byte, and one that moves patch borders: a space becomes a letter, anything else a space."""
    return ord("q") + BYTE_OFFSET if id_ == ord(" ") + BYTE_OFFSET else ord(" ") + BYTE_OFFSET


def training_loss(model, token_ids, labels, layout):
    logits = model(token_ids, layout)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORE_LABEL, reduction="sum")


@every_shape
@torch.no_grad()
def test_changing_a_byte_changes_no_logit_before_it(changes):
    model, ids = small_blt(**changes), text_ids()
    positions = [j for j in range(len(ids)) if ids[j] >= BYTE_OFFSET]
    rows, borders_moved = [ids], 0
    for j in positions:
        row = ids.clone()
        row[j] = other_byte(int(ids[j]))
        rows.append(row)
        borders_moved += not torch.equal(space_lengths(row), space_lengths(ids))
    assert borders_moved > len(positions) // 2
    logits = model.logits(*batch_by_spaces(rows))
    difference = (logits[1:] - logits[0]).abs().amax(-1)
    for row, j in enumerate(positions):
        assert difference[row, :j].max() <= LOGITS_ATOL, f"byte {j} was seen before it was read"
        assert difference[row, j] > LEAK, f"byte {j} does not count at its own position"


@every_shape
@torch.no_grad()
def test_logits_of_a_prefix_equal_those_of_the_full_row(changes):
    model, ids = small_blt(**changes), text_ids()
    full = model.logits(*batch_by_spaces([ids]))
    for n in range(1, len(ids), 4):
        prefix = model.logits(*batch_by_spaces([ids[:n]]))
        torch.testing.assert_close(prefix, full[:, :n], atol=LOGITS_ATOL, rtol=0)


@torch.no_grad()
def test_bytes_reach_far_through_patches_only():
    """With a window of 8 and three local layers, 21 bytes back is all the local stacks see."""
    model = small_blt()
    ids = torch.from_numpy(document_ids(b"0 very long document with many words in it, as before it")).int()
    changed = ids.clone()
    changed[1] = other_byte(int(ids[1]))
    _, lengths = batch_by_spaces([ids])

    def change_of_logits():
        return (model.logits(changed[None], lengths) - model.logits(ids[None], lengths)).abs().amax(-1)[0]

    with_patches = change_of_logits()
    model.decoder.patch_projection.weight.zero_()
    without_patches = change_of_logits()
    assert with_patches[-10:].min() > LEAK
    assert without_patches[-10:].max() == 0
    assert without_patches[1] > LEAK


@every_shape
@torch.no_grad()
def test_packed_documents_give_the_logits_that_each_gives_alone(changes):
    model = small_blt(**changes)
    together, _, layout = stack_rows([packed(DOCUMENTS, RowShape(1, 200, 80))], RowShape(1, 200, 80))
    in_one_row = model(together, layout)[0]
    ids = torch.cat([torch.from_numpy(document_ids(document)) for document in DOCUMENTS]).int()
    by_lengths = model.logits(*batch_by_spaces([ids]))[0]
    first = 0
    for document in DOCUMENTS:
        alone, _, layout = stack_rows([packed([document], RowShape(1, 100, 50))], RowShape(1, 100, 50))
        n = len(document) + 2
        expected = model(alone, layout)[0, :n]
        for got in (in_one_row, by_lengths):
            torch.testing.assert_close(got[first : first + n], expected, atol=LOGITS_ATOL, rtol=0)
        first += n
    assert ids[first - 1] == EOS_ID


@torch.no_grad()
def test_without_document_borders_the_logits_would_differ():
    """The row above is no easy one: the same bytes as one document give other logits."""
    model = small_blt()
    ids, _, layout = stack_rows([packed(DOCUMENTS[:2], RowShape(1, 100, 60))], RowShape(1, 100, 60))
    apart = model(ids, layout)
    joined = layout._replace(byte_doc_BS=layout.byte_doc_BS.clamp(max=0), patch_doc_BP=layout.patch_doc_BP.clamp(max=0))
    n = len(DOCUMENTS[0]) + 2
    difference = (model(ids, joined) - apart).abs().amax(-1)[0]
    assert difference[:n].max() <= LOGITS_ATOL
    assert difference[n : n + 20].min() > LEAK


@torch.no_grad()
def test_segments_of_a_row_do_not_matter():
    """The same bytes in rows of 1, 2, 4 or 8 segments: other slots, same logits, row by row of a batch."""
    model = small_blt()
    n = sum(len(document) + 2 for document in DOCUMENTS)
    slots = set()
    logits = []
    for segments in (1, 2, 4, 8):
        shape = RowShape(segments, -(-n // segments) + 23 * (segments - 1), -(-60 // segments) + 2 * segments)
        slots.add((shape.n_bytes, shape.n_patches))
        ids, _, layout = stack_rows([packed(DOCUMENTS[::-1], shape), packed(DOCUMENTS, shape)], shape)
        logits.append(model(ids, layout)[:, :n])
    assert len(slots) == 4
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=LOGITS_ATOL, rtol=0)


def test_padding_and_the_other_rows_of_a_batch_do_not_matter():
    """More slots, other ids in padded slots, and other rows change neither logits nor gradients."""
    model = small_blt()

    def logits_and_gradients(rows, shape, fill):
        ids, labels, layout = stack_rows(rows, shape)
        ids = torch.where(layout.byte_doc_BS < 0, fill, ids)
        model.zero_grad()
        training_loss(model, ids, labels, layout).backward()
        return model(ids, layout).detach()[0, :60], {name: p.grad for name, p in model.named_parameters()}

    tight, wide = RowShape(1, 70, 40), RowShape(3, 70, 50)
    documents = DOCUMENTS[:2]
    expected, gradients = logits_and_gradients([packed(documents, tight)], tight, fill=0)
    for rows, shape, fill in (
        ([packed(documents, wide)], wide, 0),
        ([packed(documents, tight)], tight, 77),
        ([packed(documents, wide), empty_row(wide), empty_row(wide)], wide, 259),
    ):
        logits, others = logits_and_gradients(rows, shape, fill)
        torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)
        for name, gradient in gradients.items():
            error = (others[name] - gradient).norm()
            assert error <= 1e-5 * gradient.norm() + 1e-5, f"{name}: {error:.1e} of {gradient.norm():.1e}"


@every_shape
def test_a_batch_of_empty_rows_has_zero_gradients(changes):
    model = small_blt(**changes)
    ids, labels, layout = stack_rows([empty_row(RowShape(2, 40, 10))] * 2, RowShape(2, 40, 10))
    loss = training_loss(model, ids, labels, layout)
    loss.backward()
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), f"{name}: {parameter.grad.abs().max()}"
    assert model(ids, layout).isfinite().all()


@every_shape
def test_every_parameter_learns(changes):
    model = small_blt(**changes)
    shape = RowShape(2, 60, 40)
    ids, labels, layout = stack_rows([packed(DOCUMENTS[:2], shape), empty_row(shape)], shape)
    training_loss(model, ids, labels, layout).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 1e-6, name


@every_shape
def test_forward_and_backward_read_nothing_on_the_host(changes):
    model = small_blt(**changes)
    shape = RowShape(2, 60, 40)
    ids, labels, layout = stack_rows([packed(DOCUMENTS[:2], shape), empty_row(shape)], shape)
    with NoHostRead() as watch:
        training_loss(model, ids, labels, layout).backward()
    assert "embedding_dense_backward" in watch.seen, "the backward was not watched"


@pytest.mark.parametrize("read", [torch.Tensor.item, lambda x: x[x > 0], torch.nonzero, bool])
def test_the_watch_sees_host_reads(read):
    with pytest.raises(AssertionError, match="on the host"), NoHostRead():
        read(torch.ones(1))


@every_shape
def test_runs_on_the_meta_device(changes):
    """Also the check for `.tolist()` and `.numpy()`, which the watch above cannot see and meta tensors refuse."""
    args = small_blt(**changes).args
    with torch.device("meta"):
        model = BLT(args)
    ids, labels, layout = stack_rows([packed(DOCUMENTS[:2], RowShape(1, 128, 40))] * 2, RowShape(1, 128, 40))
    layout = layout.map(lambda x: x.to("meta"))
    loss = training_loss(model, ids.to("meta"), labels.to("meta"), layout)
    loss.backward()
    assert model(ids.to("meta"), layout).shape == (2, 128, VOCAB_SIZE)
    assert all(parameter.grad.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([[2, 4, 5]], r"begin with 1 in every row: .* got first lengths \[2\]"),
        ([[0, 1, 10]], r"begin with 1 in every row: .* got first lengths \[0\]"),
        ([[1, 4, 5]], r"sum to S \+ 1 = 11 in every row .* got \[10\]"),
        ([[1, 0, 4, 6]], "be positive, then zeros on the right as padding"),
    ],
)
def test_bad_patch_lengths_are_refused(lengths, said):
    model = small_blt()
    with pytest.raises(ValueError, match=f"^patch_lengths must {said}$"):
        model.logits(text_ids()[None, :10], torch.tensor(lengths))


@torch.no_grad()
def test_encoder_cross_attention_after_every_layer_differs():
    batch = batch_by_spaces([text_ids()])
    last = small_blt(encoder_layers=2)
    every = small_blt(encoder_layers=2, encoder_cross_attn_all_layers=True)
    assert len(last.encoder.cross_attention) == 1
    assert len(every.encoder.cross_attention) == 2
    shared = dict(last.named_parameters())
    for name, parameter in every.named_parameters():
        if name in shared:
            parameter.copy_(shared[name])
    assert (last.logits(*batch) - every.logits(*batch)).abs().max() > LEAK


@torch.no_grad()
def test_each_cross_attention_doubles_the_residual():
    """Without attention (wo = 0) a patch is doubled once per cross-attention, and pooled after the first of them."""
    states, seen = {}, {}
    for every in (False, True):
        model = small_blt(encoder_layers=2, encoder_cross_attn_all_layers=every)
        for cross in model.encoder.cross_attention:
            cross.wo.weight.zero_()
        for name in ("0", "1"):
            model.encoder.layers[name].register_forward_hook(lambda m, args, out, n=name: seen.update({n: out}))
        ids, _, layout = stack_rows([packed(DOCUMENTS[:1], RowShape(1, 32, 9))], RowShape(1, 32, 9))
        model.encoder.register_forward_hook(lambda m, args, out: states.update(patches=out[1]))
        model(ids, layout)
        pooled_after, factor = ("0", 4) if every else ("1", 2)
        for p in range(int(layout.byte_patch_BS.max()) + 1):
            pooled = seen[pooled_after][0, layout.byte_patch_BS[0] == p].amax(0)
            expected = factor * model.encoder.patch_projection(pooled)
            torch.testing.assert_close(states["patches"][0, p], expected, atol=LOGITS_ATOL, rtol=LOGITS_ATOL)


def test_documents_by_spaces_cut_no_patch_over_a_border():
    ids, cuts = documents_by_spaces(DOCUMENTS)
    assert set((ids == EOS_ID).nonzero()[0] + 1) <= set(cuts.tolist())


@pytest.mark.gpu
@needs_cuda
@every_shape
def test_cuda_equals_cpu(changes):
    # Heads of 16 features and more, as FlexAttention wants them.
    shape = RowShape(2, 100, 45)
    ids, labels, layout = stack_rows([packed(DOCUMENTS, shape), packed(DOCUMENTS[:1], shape), empty_row(shape)], shape)
    results = []
    for device in ("cpu", "cuda"):
        model = small_blt(**changes).to(device)
        on_device = layout.map(lambda x, device=device: x.to(device))
        loss = training_loss(model, ids.to(device), labels.to(device), on_device)
        loss.backward()
        logits = model(ids.to(device), on_device).detach().cpu()
        results.append((logits, {name: p.grad.cpu() for name, p in model.named_parameters()}))
    (cpu_logits, cpu_grads), (cuda_logits, cuda_grads) = results
    real = layout.byte_doc_BS >= 0
    torch.testing.assert_close(cuda_logits[real], cpu_logits[real], atol=GPU_LOGITS_ATOL, rtol=0)
    assert cuda_logits.isfinite().all()
    for name, expected in cpu_grads.items():
        error = (cuda_grads[name] - expected).norm()
        assert error <= GPU_GRADIENT_RTOL * expected.norm(), f"{name}: {error:.1e} of {expected.norm():.1e}"


@pytest.mark.gpu
@needs_cuda
def test_cuda_forward_and_backward_never_wait_for_the_device():
    model = small_blt().to("cuda")
    # Enough bytes that the embedding's backward takes its sorting path too.
    ids, labels, layout = stack_rows([packed(DOCUMENTS, RowShape(2, 100, 45))] * 20, RowShape(2, 100, 45))
    ids, labels, layout = ids.cuda(), labels.cuda(), layout.map(torch.Tensor.cuda)
    training_loss(model, ids, labels, layout).backward()  # compiles FlexAttention
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = training_loss(model, ids, labels, layout)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert loss.isfinite()


def test_the_keys_of_a_slice_are_aligned():
    """W - 1 keys before a slice would make every row of a tile begin at an odd address: W are there, one never seen."""
    S, W = 256, 128
    model = small_blt(local_window=W, attention_backend="flex")
    slots = torch.arange(S)[None].int()
    halo = torch.arange(W - 1)[None].int()
    before = SliceLayout(halo * 0 + 5, halo * 0, slots[:, : W - 1], halo, slots[:, :1])
    layout = PatchLayout(slots + W, slots * 0, slots // 4, slots // 4, slots, slots * 0, before)
    _, mask = model._byte_context(layout)
    assert mask.inner.seq_lengths == (S, W + S)
    assert mask.halo_BW.shape == (1, W)
    assert mask.halo_BW[0, 0] == PADDING
    # The added one is seen by nobody, though a document reaches beyond it.
    b, h = torch.tensor(0), torch.tensor(0)
    assert not any(bool(mask.inner.mask_mod(b, h, torch.tensor(q), torch.tensor(0))) for q in range(S))
    assert bool(mask.inner.mask_mod(b, h, torch.tensor(0), torch.tensor(1)))
