"""A step computes once its second micro-batch is there, and is the step that it is with all of them fetched first."""

import pytest

from blt_titan.batch import Batch
from blt_titan.loss import ByteCrossEntropy, count_targets
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import make_trainer

pytestmark = pytest.mark.slow

GRADIENT_RTOL = 1e-5
"""fp32: gradients divided by the number of targets at the end, or at the beginning."""


def watch_a_step(out: str, overrides: list[str]) -> tuple[list[str], float]:
    """Return what happened in a step, in order, and how far its gradients are from those of whole batches, at worst."""
    trainer = make_trainer(out, *overrides, "--training.max_norm=inf", "--checkpoint.no-enable")
    events: list[str] = []
    batches: list[Batch] = []

    def fetched():
        for batch in trainer.dataloader:
            events.append("fetch")
            batches.append(batch)
            yield batch

    to, forward_backward = Batch.to, trainer.forward_backward_step
    Batch.to = lambda batch, device: events.append("copy") or to(batch, device)  # pyright: ignore
    trainer.forward_backward_step = lambda **kwargs: events.append("compute") or forward_backward(**kwargs)
    found = {}

    def keep_gradients(*_args, **_kwargs):
        found.update({name: p.grad.clone() for name, p in trainer.model_parts[0].named_parameters()})

    trainer.optimizers.step = keep_gradients
    trainer.step = 1
    trainer.train_step(trainer.batch_generator(fetched()))

    model, loss_fn = trainer.model_parts[0], ByteCrossEntropy()
    model.zero_grad()
    targets = sum(int(count_targets(batch.labels_BS)[0]) for batch in batches)
    for batch in batches:
        with loss_fn.step(targets):
            loss_fn(model(batch.ids_BS, layout=batch.layout), batch.labels_BS).backward()
    assert set(found) == {name for name, p in model.named_parameters() if p.grad is not None}
    worst = max(float((found[name] - p.grad).norm() / p.grad.norm()) for name, p in model.named_parameters())
    Batch.to = to
    trainer.close()
    return events, worst


def test_a_step_computes_before_its_last_micro_batch_is_fetched(small_run, tmp_path):
    [(events, worst)] = run_distributed(watch_a_step, 1, str(tmp_path), small_run)
    assert events == [
        *("fetch", "copy", "fetch", "copy", "compute", "fetch", "copy", "compute"),
        *("fetch", "copy", "compute", "compute"),
    ]
    assert worst <= GRADIENT_RTOL
