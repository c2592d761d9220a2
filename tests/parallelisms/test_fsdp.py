"""FSDP2 and HSDP over gloo ranks against the single process: loss, every gradient, parameters, held-out figure."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.integration.runs import losses, make_trainer, metrics, train, whole

pytestmark = pytest.mark.slow

LOSS_ATOL = 1e-5
"""fp32 gradients are summed in another order; after 20 steps of AdamW at 2e-3 the losses differ by about 1e-6."""
BF16_LOSS_RTOL = 0.02
"""bf16 keeps 8 bits: losses of the first steps agree with fp32 within a percent or so."""
GRADIENT_RTOL = 1e-4
GRADIENT_FLOOR = 1e-7
"""|g - r| <= rtol |r| + floor * (norm of all gradients): fp32 sums of a few hundred positions in another order."""


def first_step_gradients(out: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Make one step without updating, and return every gradient, whole, by name."""
    trainer = make_trainer(out, *overrides, "--training.max_norm=1e9", "--checkpoint.no-enable")
    seen = {}

    def keep_gradients(*_):
        for name, parameter in trainer.model_parts[0].named_parameters():
            assert parameter.grad is not None, name
            seen[name] = whole(parameter.grad).clone()

    trainer.optimizers.step = keep_gradients
    trainer.step = 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    trainer.close()
    return seen


def run_layouts(out: str, overrides: list[str], layouts: dict[str, list[str]]) -> dict[str, tuple[dict, dict]]:
    """Gradients of the first step and parameters after 20, for each layout."""
    return {
        name: (
            first_step_gradients(f"{out}/{name}-gradients", [*overrides, *layout]),
            train(f"{out}/{name}", *overrides, *layout, "--validation.enable", "--checkpoint.interval=10"),
        )
        for name, layout in layouts.items()
    }


@pytest.fixture(scope="module")
def single(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("single")
    [result] = run_distributed(run_layouts, 1, str(out), small_run, {"single": []})
    return out / "single", *result["single"]


LAYOUTS = {
    "fsdp2": ["--parallelism.data_parallel_shard_degree=2"],
    "replicate2": ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"],
}


@pytest.fixture(scope="module")
def two_ranks(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    results = run_distributed(run_layouts, 2, str(out), small_run, LAYOUTS)
    return out, results[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(layout, single, two_ranks):
    single_out, single_gradients, _ = single
    out, results = two_ranks
    gradients, parameters = results[layout]

    assert gradients.keys() == single_gradients.keys()
    floor = GRADIENT_FLOOR * torch.stack([g.norm() for g in single_gradients.values()]).norm()
    for name, reference in single_gradients.items():
        error = (gradients[name] - reference).norm()
        assert error <= GRADIENT_RTOL * reference.norm() + floor, f"{name}: {error:.1e} of {reference.norm():.1e}"

    expected, got = losses(single_out), losses(out / layout)
    assert expected.keys() == got.keys()
    for step, loss in expected.items():
        assert abs(got[step] - loss) <= LOSS_ATOL, f"step {step}: {got[step]} and {loss}"
    # Data order and counts do not depend on the layout at all.
    for mine, reference in zip(metrics(out / layout), metrics(single_out), strict=True):
        for key in ("padded_byte_share", "padded_patch_share", "mean_patch_bytes"):
            assert mine.get(key) == reference.get(key)
        if "heldout_bits_per_byte" in reference:
            assert abs(mine["heldout_bits_per_byte"] - reference["heldout_bits_per_byte"]) <= LOSS_ATOL
    assert parameters.keys() == single_gradients.keys()


def resume_elsewhere(out: str, overrides: list[str]) -> None:
    train(out, *overrides, "--training.steps=20", "--checkpoint.load_step=10")


def test_a_checkpoint_of_two_ranks_resumes_on_one(small_run, single, two_ranks):
    """Rows 41 to 80 come from the same streams at the same positions, whoever made the first 40."""
    single_out, _, _ = single
    out, _ = two_ranks
    run_distributed(resume_elsewhere, 1, str(out / "fsdp2"), [*small_run, "--checkpoint.interval=100"])
    expected, got = losses(single_out), losses(out / "fsdp2")
    assert expected.keys() == got.keys()
    for step, loss in expected.items():
        assert abs(got[step] - loss) <= LOSS_ATOL, f"step {step}: {got[step]} and {loss}"


def train_in_bf16(out: str, overrides: list[str]) -> set[torch.dtype]:
    """Return the dtypes of the rotary tables that a global block receives."""
    trainer = make_trainer(out, *overrides, "--training.mixed_precision_param=bfloat16", "--checkpoint.no-enable")
    seen = set()
    block = trainer.model_parts[0].layers["0"]
    block.attention.register_forward_pre_hook(lambda module, inputs: seen.update(table.dtype for table in inputs[1]))
    trainer.train()
    trainer.close()
    return seen


def test_bf16_keeps_the_rotary_tables_in_fp32(small_run, single, tmp_path):
    dtypes, _ = run_distributed(train_in_bf16, 2, str(tmp_path), [*small_run, "--training.steps=5"])
    assert dtypes == {torch.float32}
    expected, got = losses(single[0]), losses(tmp_path)
    for step, loss in got.items():
        assert abs(loss - expected[step]) <= BF16_LOSS_RTOL * expected[step], f"step {step}"


def initial_weights(out: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    trainer = make_trainer(out, *overrides, "--checkpoint.no-enable")
    parameters = {name: whole(p).detach().clone() for name, p in trainer.model_parts[0].named_parameters()}
    trainer.close()
    return parameters


def test_initial_weights_do_not_depend_on_the_layout(small_run, tmp_path):
    [one] = run_distributed(initial_weights, 1, str(tmp_path), small_run)
    two, _ = run_distributed(initial_weights, 2, str(tmp_path), small_run)
    assert one.keys() == two.keys()
    for name, parameter in one.items():
        assert torch.equal(parameter, two[name]), name
