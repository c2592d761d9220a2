"""`debug.deterministic = true` can be honoured on CUDA: no operation of a step is one that torch then refuses.

Torch refuses in the kernels of CUDA, so a CPU cannot be asked; the operations of a step are compared with the list in
the documentation of `torch.use_deterministic_algorithms`. Attention is not among them: on CUDA it is FlexAttention,
whose kernels write each sum from one place.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import RowShape
from blt_titan.loss import ByteCrossEntropy
from tests.helpers.small_models import small_blt, small_entropy_model
from tests.helpers.word_rows import word_rows

SHAPE = RowShape(segments=2, segment_bytes=64, segment_patches=24)
EMBEDDING_BAG_MAX = 2
ALWAYS_REFUSED = {
    *("put", "put_", "histc", "median", "nanmedian", "kthvalue", "mode", "nll_loss2d_forward", "nll_loss2d_backward"),
    *("_ctc_loss_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "_adaptive_avg_pool2d_backward"),
}
OF_FLOATS = {"cumsum", "logcumsumexp", "cumprod"}


class Refused(TorchDispatchMode):
    """Collects the operations that torch would refuse on CUDA."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        self.seen.add(name)
        words = [argument for argument in (*args, *(kwargs or {}).values()) if isinstance(argument, str)]
        if (
            name in ALWAYS_REFUSED
            or (name in OF_FLOATS and result.is_floating_point())
            or (name.startswith("scatter_reduce") and "prod" in words)
            or (name == "bincount" and len(args) > 1 and args[1] is not None)
            or (name == "_embedding_bag" and args[4] == EMBEDDING_BAG_MAX)
        ):
            self.found.add(name)
        return result


@pytest.mark.parametrize("make", [small_blt, small_entropy_model])
def test_no_operation_of_a_step_is_refused(make):
    model, batch, loss_fn = make(), collate_rows(word_rows(2, SHAPE), SHAPE), ByteCrossEntropy()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with Refused() as operations:
        with loss_fn.step(1.0):
            loss_fn(model(batch.ids_BS, batch.layout), batch.labels_BS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert {"embedding_dense_backward", "nll_loss_backward"} <= operations.seen, "backward was not watched"
    assert operations.found == set()


def test_an_operation_that_is_refused_is_found():
    with Refused() as operations:
        torch.ones(3).cumsum(0)
        torch.ones(3, dtype=torch.int64).cumsum(0)
        torch.zeros(3).scatter_reduce(0, torch.tensor([0, 1, 2]), torch.ones(3), "amax")
        assert operations.found == {"cumsum"}
        torch.zeros(3).scatter_reduce(0, torch.tensor([0, 1, 2]), torch.ones(3), "prod")
        torch.histc(torch.ones(3))
    assert operations.found == {"cumsum", "scatter_reduce", "histc"}
