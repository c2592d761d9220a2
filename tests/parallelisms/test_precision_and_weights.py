"""bf16 compute under FSDP, and initial weights that no layout changes."""

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, make_trainer, plain_name, train, whole

pytestmark = pytest.mark.slow

BF16_LOSS_RTOL = 0.02
"""bf16 keeps 8 bits: losses of the first steps agree with fp32 within a percent or so."""

LAYOUTS = {
    "fsdp2": ["--parallelism.data_parallel_shard_degree=2"],
    "tp2": ["--parallelism.tensor_parallel_degree=2"],
    "pp2": ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"],
    "fsdp_tables": ["--parallelism.data_parallel_shard_degree=2", "--hash_embedding.sharding=fsdp"],
}


def train_in_bf16(out: str, overrides: list[str]) -> dict[str, set[torch.dtype]]:
    """Return the dtypes of the rotary tables that global blocks receive, by layout."""
    seen: dict[str, set[torch.dtype]] = {}
    for name, layout in LAYOUTS.items():
        settings = [*overrides, *layout, "--training.mixed_precision_param=bfloat16", "--checkpoint.no-enable"]
        trainer = make_trainer(f"{out}/{name}", *settings)
        dtypes = seen[name] = set()
        for part in trainer.model_parts:
            for block in part.layers.values():
                block.attention.register_forward_pre_hook(
                    lambda module, inputs, dtypes=dtypes: dtypes.update(table.dtype for table in inputs[1])
                )
        trainer.train()
        trainer.close()
    return seen


def test_bf16_keeps_the_rotary_tables_in_fp32(small_run, tmp_path):
    run_distributed(train, 1, str(tmp_path / "fp32"), *small_run, "--training.steps=5", "--checkpoint.no-enable")
    by_rank = run_distributed(train_in_bf16, 2, str(tmp_path), [*small_run, "--training.steps=5"])
    for name in LAYOUTS:
        assert set().union(*(seen[name] for seen in by_rank)) == {torch.float32}
    expected = losses(tmp_path / "fp32")
    for name in LAYOUTS:
        got = losses(tmp_path / name)
        assert got.keys() == expected.keys()
        assert got != expected, "nothing was computed in bf16"
        for step, loss in got.items():
            assert abs(loss - expected[step]) <= BF16_LOSS_RTOL * expected[step], f"{name}, step {step}"


def initial_weights(out: str, overrides: list[str], layouts: dict[str, list[str]]) -> dict[str, dict]:
    weights = {}
    for name, layout in layouts.items():
        trainer = make_trainer(out, *overrides, *layout, "--checkpoint.no-enable")
        parameters = {n: p for part in trainer.model_parts for n, p in part.named_parameters()}
        weights[name] = {plain_name(n): whole(p).detach().clone() for n, p in parameters.items()}
        trainer.close()
    return weights


def test_initial_weights_do_not_depend_on_the_layout(small_run, tmp_path):
    [one] = run_distributed(initial_weights, 1, str(tmp_path), small_run, {"one": []})
    ranks = run_distributed(initial_weights, 2, str(tmp_path), small_run, LAYOUTS)
    for layout in LAYOUTS:
        held = {name for rank in ranks for name in rank[layout]}
        assert held == one["one"].keys()
        for rank in ranks:
            for name, parameter in rank[layout].items():
                assert torch.equal(one["one"][name], parameter), f"{layout}: {name}"
