"""The entropy model: causality, its window's reach, documents apart, one loader for both models."""

import pytest
import torch

from blt_titan.byte_vocab import document_ids
from blt_titan.data.rows.packing import RowShape, empty_row
from blt_titan.layout import layout_without_patches
from tests.helpers.small_models import DOCUMENTS, packed, small_entropy_model, stack_rows
from tests.helpers.tensor_watch import NoHostRead

LOGITS_ATOL = 1e-5
"""fp32, logits of order 1: sums over other shapes and RoPE at other positions; a leak shows above 1e-3."""
LEAK = 1e-4
"""A change that a byte must notice moves some logit by more than this."""


def score(model, ids_BS):
    return model(ids_BS, layout_without_patches(torch.zeros_like(ids_BS)))


@pytest.mark.parametrize(("window", "reach"), [(4, 6), (8, 14), (100, 99)])
@torch.no_grad()
def test_a_byte_reaches_forward_by_the_window_of_each_layer_and_never_back(window, reach):
    model = small_entropy_model(window=window)
    ids = torch.randint(4, 260, (48,), generator=torch.Generator().manual_seed(0))
    rows = ids.repeat(49, 1)
    rows[1:].diagonal().copy_((ids - 4 + 101) % 256 + 4)
    logits = score(model, rows)
    difference = (logits[1:] - logits[0]).abs().amax(-1)
    for j in range(48):
        assert not (difference[j, :j] > LOGITS_ATOL).any(), f"byte {j} was seen before it was read"
        assert not (difference[j, j + reach + 1 :] > LOGITS_ATOL).any(), f"byte {j} was seen beyond the window"
        assert (difference[j, j : j + min(reach, 14)] > LOGITS_ATOL).all()
        assert difference[j, j] > LEAK


@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other():
    model = small_entropy_model()
    ids, _, layout = stack_rows([packed(DOCUMENTS, RowShape(1, 200, 80))], RowShape(1, 200, 80))
    together = model(ids, layout)[0]
    first = 0
    for document in DOCUMENTS:
        alone = score(model, torch.from_numpy(document_ids(document))[None].int())[0]
        torch.testing.assert_close(together[first : first + len(alone)], alone, atol=LOGITS_ATOL, rtol=0)
        first += len(alone)


def test_gradients_are_finite_with_empty_rows_and_nothing_is_read_on_the_host():
    model = small_entropy_model()
    shape = RowShape(1, 70, 60)
    ids, _, layout = stack_rows([packed(DOCUMENTS[:2], shape), empty_row(shape)], shape)
    with NoHostRead() as watch:
        logits = model(ids, layout)
        (logits[:1].logsumexp(-1) * (layout.byte_doc_BS[:1] >= 0)).sum().backward()
    assert "embedding_dense_backward" in watch.seen, "the backward was not watched"
    assert logits.isfinite().all()
    assert logits.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
