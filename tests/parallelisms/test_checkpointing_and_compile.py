"""Activation checkpointing and compile change memory and speed, not the losses."""

import pytest

from tests.distributed import run_distributed
from tests.integration.runs import losses, train

pytestmark = pytest.mark.slow

COMPILED_LOSS_ATOL = 1e-4
"""Inductor fuses and reorders fp32 sums; over 4 steps of AdamW the losses differ by about 1e-6."""

VARIANTS = {
    "none": [],
    "full": ["--activation_checkpoint.mode=full"],
    "selective_op": ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"],
    "selective_2": ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"],
    "compile": ["--compile.enable", "--compile.components=model"],
    "compile_full": ["--compile.enable", "--compile.components=model", "--activation_checkpoint.mode=full"],
}


def train_variants(out: str, overrides: list[str]) -> None:
    for name, variant in VARIANTS.items():
        train(f"{out}/{name}", *overrides, "--training.steps=4", "--checkpoint.no-enable", *variant)


@pytest.fixture(scope="module")
def variants(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("variants")
    run_distributed(train_variants, 1, str(out), small_run)
    return {name: losses(out / name) for name in VARIANTS}


@pytest.mark.parametrize("name", ["full", "selective_op", "selective_2"])
def test_activation_checkpointing_is_bit_identical(name, variants):
    assert variants[name] == variants["none"]


@pytest.mark.parametrize("name", ["compile", "compile_full"])
def test_compiled_losses_agree(name, variants):
    assert variants[name].keys() == variants["none"].keys()
    for step, loss in variants["none"].items():
        assert abs(variants[name][step] - loss) <= COMPILED_LOSS_ATOL, step
