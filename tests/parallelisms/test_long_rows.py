"""A row of 64 KiB through the trainer on four context ranks: the same step, and a quarter of it kept for backward."""

from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.saved_memory import saved_bytes
from tests.helpers.training_runs import make_trainer, plain_name, whole

pytestmark = [pytest.mark.slow, pytest.mark.full]

LOSS_ATOL = 1e-5
"""fp32 sums over 64 Ki bytes in another order."""
GRADIENT_RTOL = 1e-4
"""Share of the norm of all gradients."""
LEAST_SAVING = 3


def one_step(out: str, overrides: list[str], cp: int) -> dict[str, Any]:
    """Train one step on one row. Return its loss, the gradients, and what this rank's model saved for backward."""
    trainer = make_trainer(out, *overrides, f"--parallelism.context_parallel_degree={cp}")
    [model] = trainer.model_parts
    seen: dict[str, Any] = {}
    forward = model.forward

    def counted_forward(*args, **kwargs):
        with saved_bytes(model) as saved:
            logits = forward(*args, **kwargs)
        seen["saved"] = saved.total
        return logits

    model.forward = counted_forward
    step = trainer.optimizers.step

    def keep_gradients(*args, **kwargs):
        seen["gradients"] = {plain_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        step(*args, **kwargs)

    trainer.optimizers.step = keep_gradients

    def log_step(step, *, loss_nats, counts, **_):
        seen.update(loss=loss_nats, counts=counts)

    trainer.metrics_processor.log_step = log_step
    trainer.train()
    trainer.close()
    return seen


@pytest.mark.timeout(1200)
def test_four_context_ranks_share_a_row_of_64_kib(stdlib_data, tmp_path):
    overrides = [
        f"--training.dataset_path={stdlib_data}",
        "--training.seq_len=65536",
        "--training.local_batch_size=1",
        "--training.global_batch_size=1",
        "--training.steps=1",
        "--data.streams=1",
        "--validation.no-enable",
        "--checkpoint.no-enable",
        "--metrics.no-enable-tensorboard",
        "--metrics.log_freq=1",
    ]
    [single] = run_distributed(one_step, 1, str(tmp_path / "one"), overrides, 1, timeout_s=1000)
    ranks = run_distributed(one_step, 4, str(tmp_path / "four"), overrides, 4, timeout_s=1000)
    assert single["counts"][3] == 65536, "byte slots of the row"
    norm = torch.stack([g.norm() for g in single["gradients"].values()]).norm()
    for rank in ranks:
        assert abs(rank["loss"] - single["loss"]) <= LOSS_ATOL
        assert rank["counts"] == single["counts"]
        assert rank["gradients"].keys() == single["gradients"].keys()
        for name, gradient in rank["gradients"].items():
            assert (gradient - single["gradients"][name]).norm() <= GRADIENT_RTOL * norm, name
        assert single["saved"] >= LEAST_SAVING * rank["saved"]
    print(f"saved for backward: {single['saved']:,} bytes on one rank, {[r['saved'] for r in ranks]} on four")
