"""A dry run keeps what a run keeps: the same step on tensors with data and without, storage by storage."""

import logging
import multiprocessing

import pytest

from blt_titan.commands.run_settings import config_file, run_arguments
from blt_titan.config.check import load_run_config
from blt_titan.config.rules.target import this_machine
from blt_titan.dry_run import fake_cuda
from blt_titan.dry_run.memory import LiveBytes, Memory
from blt_titan.dry_run.run import dry_run

pytestmark = pytest.mark.slow
# A real step makes scalars, and what random hashing needs, that a fake one has as constants.
FEW_BYTES = 0.005
ALIKE = ("activations: decoder", "activations: encoder", "activations: blocks", "optimizer state", "parameters")


def _settings(layout: tuple[str, ...]) -> list[str]:
    return [
        *("--model.flavor=debug", "--training.dataset_path=nowhere", "--data.segment_bytes=2048"),
        *("--data.segment_patches=512", "--training.seq_len=4096", "--training.local_batch_size=1"),
        *("--training.global_batch_size=2", "--patching.max_patch_bytes=512"),
        *layout,
    ]


def _real_step(settings: list[str], world_size: int, rank: int) -> Memory:
    """Make the dry run's step on tensors that are there; what other ranks would send is whatever memory holds."""
    fake_cuda.let_meshes_be_real()
    logging.disable(logging.WARNING)
    from blt_titan.byte_vocab import VOCAB_SIZE
    from blt_titan.dry_run import step as steps

    config = load_run_config(run_arguments(config_file("debug"), settings))
    memory = LiveBytes(VOCAB_SIZE, "cpu")
    watch = memory.watch = steps.Watch([memory])
    step = steps.make_step(config, steps.take_place(config, world_size, rank), watch, memory, "cpu")
    for _ in range(2):
        memory.forget_peaks()
        step.run()
    return memory.result(memory.now())


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, ()), (2, ())],
    ids=["one rank", "fsdp 2"],
)
def test_a_real_step_holds_what_the_dry_run_says(world_size, layout):
    settings = _settings(layout)
    config = load_run_config(run_arguments(config_file("debug"), settings))
    rank = world_size - 1
    found = dry_run(config, world_size, kernels=False, quiet=True, rank=rank, device="cpu", target=this_machine())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        real = pool.apply(_real_step, (settings, world_size, rank))
    assert found.memory.peak_phase == real.peak_phase
    assert found.memory.peak_bytes == pytest.approx(real.peak_bytes, rel=FEW_BYTES)
    for kind in ALIKE:
        assert found.memory.after_forward[kind] == pytest.approx(real.after_forward[kind], rel=FEW_BYTES), kind
