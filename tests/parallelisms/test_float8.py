"""Float8 on the global transformer: which linears, and that a run with it learns as bf16 does (emulated on a CPU)."""

import statistics

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, make_trainer, metrics, plain_name

pytest.importorskip("torchao", reason="float8 needs torchao: pip install 'blt_titan[float8]'")

pytestmark = pytest.mark.slow

LOSS_RTOL = 0.02
"""Float8 keeps 3 or 2 bits of mantissa; after 100 steps the mean loss stays within 2 % of bf16."""

CONVERT = ["--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate"]
BF16 = ["--training.mixed_precision_param=bfloat16"]
RECIPES = {"tensorwise": [], "rowwise": ["--quantize.linear.float8.recipe_name=rowwise"]}
GLOBAL_LINEARS = {
    f"layers.{layer}.{linear}"
    for layer in range(3)
    for linear in (*(f"attention.w{x}" for x in "qkvo"), *(f"feed_forward.w{x}" for x in "123"))
}


def converted_names(out: str, overrides: list[str]) -> list[tuple[str, str]]:
    trainer = make_trainer(out, *overrides, "--checkpoint.no-enable")
    found = [
        (plain_name(name), type(module).__name__)
        for part in trainer.model_parts
        for name, module in part.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    trainer.close()
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_exactly_the_global_linears_are_converted(recipe, small_run, tmp_path):
    [linears] = run_distributed(converted_names, 1, str(tmp_path), [*small_run, *CONVERT, *RECIPES[recipe]])
    kinds = dict(linears)
    assert {name for name, kind in kinds.items() if "Float8" in kind} == GLOBAL_LINEARS
    assert {kind for name, kind in kinds.items() if name not in GLOBAL_LINEARS} == {"Linear"}
    assert len(kinds) > len(GLOBAL_LINEARS) + 10


def train_runs(out: str, overrides: list[str], runs: dict[str, list[str]]) -> dict[str, set[str]]:
    """Train, and return the names of the converted linears of this rank, by run."""
    converted = {}
    for name, settings in runs.items():
        trainer = make_trainer(f"{out}/{name}", *overrides, *settings, "--checkpoint.no-enable")
        converted[name] = {
            plain_name(module_name)
            for part in trainer.model_parts
            for module_name, module in part.named_modules()
            if "Float8Linear" in type(module).__name__
        }
        trainer.train()
        trainer.close()
    return converted


def mean_of_last(out, steps: int) -> float:
    return statistics.fmean(line["loss_nats"] for line in metrics(out)[-steps:])


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_a_hundred_steps_in_float8_follow_bf16(small_run, tmp_path):
    runs = {"bf16": BF16} | {name: [*BF16, *CONVERT, *recipe] for name, recipe in RECIPES.items()}
    settings = [*small_run, "--training.steps=100", "--lr_scheduler.total_steps=100", "--lr_scheduler.warmup_steps=10"]
    run_distributed(train_runs, 1, str(tmp_path), settings, runs, timeout_s=2000)
    expected = mean_of_last(tmp_path / "bf16", 10)
    assert expected < 0.7 * losses(tmp_path / "bf16")[1], "the run means to learn"
    for recipe in RECIPES:
        got = mean_of_last(tmp_path / recipe, 10)
        print(f"{recipe}: {got:.4f} nats, bf16 {expected:.4f}")
        assert abs(got - expected) <= LOSS_RTOL * expected
        assert losses(tmp_path / recipe) != losses(tmp_path / "bf16"), "nothing was converted"


LAYOUTS = {
    "tp2_tensorwise": ["--parallelism.tensor_parallel_degree=2"],
    "tp2_rowwise": ["--parallelism.tensor_parallel_degree=2", *RECIPES["rowwise"]],
    "fsdp2_float8_all_gather": [
        "--parallelism.data_parallel_shard_degree=2",
        "--quantize.linear.float8.enable_fsdp_float8_all_gather",
        "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
    ],
    "cp2_tensorwise": ["--parallelism.context_parallel_degree=2"],
}


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_float8_in_layouts_follows_one_process(small_run, tmp_path):
    settings = [*small_run, *BF16, *CONVERT, "--training.steps=8"]
    run_distributed(train_runs, 1, str(tmp_path), settings, {"one": []}, timeout_s=1000)
    run_distributed(train_runs, 1, str(tmp_path), [*settings, *RECIPES["rowwise"]], {"one_rowwise": []}, timeout_s=1000)
    run_distributed(train_runs, 1, str(tmp_path), [*small_run, *BF16, "--training.steps=8"], {"bf16": []})
    by_rank = run_distributed(train_runs, 2, str(tmp_path), settings, LAYOUTS, timeout_s=1000)
    for name in LAYOUTS:
        assert [rank[name] for rank in by_rank] == [GLOBAL_LINEARS] * 2
        assert losses(tmp_path / name) != losses(tmp_path / "bf16")
        expected = losses(tmp_path / ("one_rowwise" if "rowwise" in name else "one"))
        for step, loss in losses(tmp_path / name).items():
            assert abs(loss - expected[step]) <= LOSS_RTOL * expected[step], f"{name}, step {step}"
