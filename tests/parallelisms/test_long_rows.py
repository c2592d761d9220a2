"""A row of 64 KiB on four context ranks: the same loss, and a rank keeps a quarter of it for backward, no more."""

import pytest
import torch

import blt_titan.titan_device  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from blt_titan.data.collate import collate_rows
from blt_titan.data.streams import RowStream
from blt_titan.loss import ByteCrossEntropy
from blt_titan.model.blt import BLT
from blt_titan.model.sizes import BLT_FLAVORS
from blt_titan.run_config import load_run_config
from blt_titan.train_spec import context_slice, row_source
from parallelisms.context import apply_context_parallel
from parallelisms.meshes import build_meshes
from parallelisms.parallelize import run_halo_slices
from tests.distributed import run_distributed
from tests.integration.runs import CONFIG_FILE
from tests.saved_memory import saved_bytes

pytestmark = [pytest.mark.slow, pytest.mark.full]

LOSS_RTOL = 1e-6
"""fp32, one forward."""
GRADIENT_RTOL = 1e-4
"""Of the norm of all gradients."""
SEQ_LEN = 65536


def one_row(overrides: list[str], cp: int) -> tuple[float, int, torch.Tensor, int]:
    """Return the loss of one row, the bytes that this rank saved for backward, a gradient, and the halo's reach."""
    config = load_run_config([f"--job.config_file={CONFIG_FILE}", *overrides, f"--training.seq_len={SEQ_LEN}"])
    config.parallelism.context_parallel_degree = cp
    model = BLT(BLT_FLAVORS["debug"])
    model.init_weights()
    halo = run_halo_slices(config, model.args.local_window)
    if cp > 1:
        dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=cp, tp=1, pp=1, ep=1, etp=1, world_size=cp)
        apply_context_parallel(model, build_meshes(dims), halo_slices=halo)
    source = row_source(config, "train", SEQ_LEN)
    row = RowStream(source.read, source.shape).next_row()
    assert row is not None
    inputs, labels = collate_rows([row], source.shape, context_slice(config))
    loss_fn = ByteCrossEntropy()
    loss_fn.n_targets = float(row.n_ids)
    with saved_bytes(model) as saved:
        loss = loss_fn(model(inputs.pop("input"), **inputs), labels)
    loss.backward()
    total, gradient = (
        loss.detach().clone(),
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
    )
    if cp > 1:
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(gradient)
    return total.item(), saved.total, gradient, halo


@pytest.mark.timeout(1200)
def test_four_context_ranks_share_a_row_of_64_kib(stdlib_data):
    overrides = [f"--training.dataset_path={stdlib_data}"]
    [(loss, saved, gradient, _)] = run_distributed(one_row, 1, overrides, 1, timeout_s=1000)
    ranks = run_distributed(one_row, 4, overrides, 4, timeout_s=1000)
    for split_loss, split_saved, split_gradient, _ in ranks:
        assert abs(split_loss - loss) <= LOSS_RTOL * loss
        assert (split_gradient - gradient).norm() <= GRADIENT_RTOL * gradient.norm()
        assert saved >= 3 * split_saved, f"{saved:,} bytes on one rank, {split_saved:,} on each of four"
    print(f"saved for backward: {saved:,} bytes on one rank, {[r[1] for r in ranks]} on four")
