"""Every layout gives the single process's loss, gradients and parameters on the same global batch."""

import itertools
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import LAYOUTS, PAGE, SHORT_LAYOUTS, SINGLE, SINGLE_SHORT, Layout, with_matrix
from tests.helpers.training_runs import make_trainer, plain_name, whole

FIRST_LOSS_ATOL = 1e-5
"""fp32 sums in another order: 12 units in the last place of a loss of 6."""
GRADIENT_RTOL = 1e-4
"""Per tensor, against its own norm: a factor 20 above what summation order was seen to do."""
GRADIENT_FLOOR = 1e-7
"""Share of the global gradient norm: tensors whose gradient is zero but for rounding."""
NORM_RTOL = 1e-5
SGD_ATOL = 1e-5
"""Parameters after one step of SGD at lr 0.5, where a gradient is at most of norm 1."""
LAST_LOSS_ATOL = 1e-4
"""After 20 steps of AdamW at lr 4e-4, which divides rounding noise by itself; more than 1e-5 was not seen."""

STEPS = 20
OVERRIDES = [
    "--data.streams=8",
    "--training.global_batch_size=8",
    f"--training.steps={STEPS}",
    "--training.max_norm=1.0",
    "--optimizer.lr=4e-4",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=20",
    "--validation.enable",
    "--validation.freq=100",
    "--validation.steps=-1",  # to the end: the last row is partly padding, so that slices are empty
    "--validation.seq_len=-1",
    "--checkpoint.no-enable",
]


def train_layout(out: str, overrides: list[str]) -> dict[str, Any]:
    """Train 20 steps. Gradients are the first step's, whole and clipped; `sgd` is a step of SGD, this rank's part."""
    trainer = make_trainer(out, *overrides)
    parameters = {plain_name(n): p for part in trainer.model_parts for n, p in part.named_parameters()}
    seen: dict[str, Any] = {"losses": [], "norms": [], "held_out": []}
    adamw_step = trainer.optimizers.step

    def first_step(*args, **kwargs):
        missing = [name for name, p in parameters.items() if p.grad is None]
        assert not missing, f"no gradient: {missing}"
        seen["gradients"] = {name: whole(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
        before = {name: p.detach().clone() for name, p in parameters.items()}
        torch.optim.SGD(parameters.values(), lr=0.5, foreach=False).step()
        seen["sgd"] = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        trainer.optimizers.step = adamw_step
        adamw_step(*args, **kwargs)

    trainer.optimizers.step = first_step

    def log_step(step, *, loss_nats, grad_norm, counts, **_):
        seen["losses"].append(loss_nats)
        seen["norms"].append(grad_norm)
        seen.setdefault("counts", counts)

    trainer.metrics_processor.log_step = log_step
    trainer.metrics_processor.log_held_out = lambda step, *, loss_nats, **_: seen["held_out"].append(loss_nats)
    trainer.train()
    trainer.close()
    return seen


def largest_difference(tensor: torch.Tensor, whole_reference: torch.Tensor) -> float:
    """Compare this rank's part of a tensor; the ranks together compare all of it."""
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        reference = distribute_tensor(whole_reference, mesh, placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    else:
        reference = whole_reference
    assert tensor.shape == reference.shape
    return float((tensor - reference).abs().max()) if tensor.numel() else 0.0


def train_reference(out: str, overrides: list[str], layouts: list[Layout]) -> None:
    for layout in layouts:
        seen = train_layout(out, [*overrides, *layout.overrides])
        _, _, n_bytes, byte_slots, patches, patch_slots, _ = seen["counts"]
        assert n_bytes < byte_slots, "the test means to have padded bytes"
        assert patches < patch_slots, "the test means to have padded patches"
        assert n_bytes % patches, "the test means to have ragged patches"
        torch.save(seen, f"{out}/reference-{layout.short}.pt")


def compare_layouts(out: str, overrides: list[str], layouts: list[Layout]) -> dict[str, dict[str, Any]]:
    """Return this rank's deviations from the reference, by layout. Tensors: error over what is allowed."""
    results = {}
    for layout in layouts:
        reference = torch.load(f"{out}/reference-{layout.short}.pt")
        if layout.compiled:  # what other layouts compiled counts against the recompile limit of this one
            torch._dynamo.reset()
        seen = train_layout(f"{out}/{layout.name}", [*overrides, *layout.overrides])
        floor = GRADIENT_FLOOR * torch.stack([g.norm() for g in reference["gradients"].values()]).norm()
        gradients = {
            name: float((g - r).norm() / (GRADIENT_RTOL * r.norm() + floor))
            for name, g in seen["gradients"].items()
            for r in [reference["gradients"][name]]
        }
        sgd = {name: largest_difference(p, reference["sgd"][name]) for name, p in seen["sgd"].items()}
        results[layout.name] = {
            "gradients": gradients,
            "sgd": sgd,
            "losses": [abs(a - b) for a, b in zip(seen["losses"], reference["losses"], strict=True)],
            "norms": [abs(a - b) / b for a, b in zip(seen["norms"], reference["norms"], strict=True)],
            "held_out": [abs(a - b) for a, b in zip(seen["held_out"], reference["held_out"], strict=True)],
            "counts": (seen["counts"], reference["counts"]),
            "names": set(reference["gradients"]),
            "clipped": reference["norms"][0] > 1.0,
        }
    return results


@pytest.fixture(scope="module")
def compared(small_run, tmp_path_factory):
    """Return a function that trains a layout, with all others of its size that are asked for, once."""
    out = tmp_path_factory.mktemp("layouts")
    overrides = [*small_run, *OVERRIDES]
    run_distributed(train_reference, 1, str(out), overrides, [SINGLE, SINGLE_SHORT])
    results: dict[str, list[dict[str, Any]]] = {}

    def get(layout: Layout, selected: set[str]) -> list[dict[str, Any]]:
        if layout.name not in results:
            together = [
                other
                for other in [*LAYOUTS, *SHORT_LAYOUTS]
                if other.ranks == layout.ranks and other.name in selected and other.name not in results
            ]
            by_rank = run_distributed(compare_layouts, layout.ranks, str(out), overrides, together, timeout_s=2400)
            for other in together:
                results[other.name] = [of_rank[other.name] for of_rank in by_rank]
        return results[layout.name]

    return get


def _parameters():
    for layout in [*LAYOUTS, *SHORT_LAYOUTS]:
        marks = [pytest.mark.slow] if layout.quick else [pytest.mark.slow, pytest.mark.full]
        yield pytest.param(layout, id=layout.name, marks=marks)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("layout", _parameters())
def test_layout_equals_the_single_process(layout, compared, request):
    selected = {item.callspec.params["layout"].name for item in request.session.items if _is_layout_test(item)}
    ranks = compared(layout, selected)

    first = ranks[0]
    assert first["clipped"], "the test means to clip"
    gradients = {name: max(r["gradients"].get(name, 0.0) for r in ranks) for name in first["names"]}
    held = set().union(*(r["gradients"] for r in ranks))
    assert held == first["names"], "parameters without a gradient on any rank"
    worst = max(gradients, key=gradients.__getitem__)
    assert gradients[worst] <= 1, f"gradient of {worst}: {gradients[worst]:.2f} times what is allowed"
    for rank in ranks:
        assert rank["losses"][0] <= FIRST_LOSS_ATOL
        assert rank["norms"][0] <= NORM_RTOL
        assert max(rank["sgd"].values()) <= SGD_ATOL
        assert rank["losses"][STEPS - 1] <= LAST_LOSS_ATOL
        assert len(rank["held_out"]) == 1
        assert rank["held_out"][0] <= LAST_LOSS_ATOL
        counted, reference = rank["counts"]
        assert counted == reference, "bytes, targets and patches do not depend on the layout"


def _is_layout_test(item: pytest.Item) -> bool:
    return getattr(item, "originalname", None) == test_layout_equals_the_single_process.__name__


def test_the_table_covers_what_is_promised():
    degrees = [(x.dp_replicate, x.dp_shard, x.cp, x.tp, x.pp) for x in LAYOUTS]
    assert len(set(degrees)) >= 24
    for axis in range(5):
        alone = {d[axis] for d in degrees if all(size == 1 for i, size in enumerate(d) if i != axis)}
        assert {2, 4} <= alone
    for pair in itertools.combinations(range(5), 2):
        assert any(all((size > 1) == (i in pair) for i, size in enumerate(d)) for d in degrees), pair
    assert sum(sum(size > 1 for size in d) == 3 for d in degrees) >= 4
    names = [layout.name for layout in [*LAYOUTS, *SHORT_LAYOUTS]]
    assert len(set(names)) == len(names)


def test_readme_shows_the_table():
    text = PAGE.read_text()
    assert with_matrix(text) == text, "run python -m tests.helpers.layouts --write"
