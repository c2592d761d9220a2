"""What a run computes on a layout, and which ranks are looked at."""

import pytest

from blt_titan.config.check import load_run_config
from blt_titan.plan.layout import compute_of, layout_of, measured_ranks, micro_batches, step_bytes

BASE = [
    *("--model.flavor=1B", "--training.dataset_path=x", "--data.streams=64", "--data.segment_bytes=6144"),
    *("--data.segment_patches=1024", "--training.seq_len=24576", "--training.local_batch_size=4"),
    "--training.global_batch_size=64",
]


def config_of(*overrides):
    return load_run_config([*BASE, *overrides])


def pipelined(degree, *overrides):
    return config_of(f"--parallelism.pipeline_parallel_degree={degree}", *overrides)


def test_a_layout_says_its_degrees():
    config = config_of(
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.context_parallel_degree=2",
        "--parallelism.data_parallel_replicate_degree=2",
    )
    layout = layout_of(config, 32)
    assert (layout.replicas, layout.shards, layout.cp, layout.tp, layout.pp, layout.dp) == (2, 4, 2, 2, 1, 8)
    assert layout.name() == "replicas 2 x fsdp 4 x cp 2 x tp 2"
    assert measured_ranks(layout) == [2], "in the middle of those that share a row"
    assert layout_of(config_of(), 1).name() == "one rank"


@pytest.mark.parametrize(
    ("degree", "world", "ranks"), [(2, 16, [0, 8]), (4, 16, [0, 4, 8, 12]), (8, 16, [0, 2, 8, 14])]
)
def test_a_rank_of_each_part_of_a_pipeline_is_looked_at(degree, world, ranks):
    assert measured_ranks(layout_of(pipelined(degree), world)) == ranks


def test_a_step_is_shared_evenly():
    config = config_of()
    layout = layout_of(config, 8)
    assert micro_batches(config, layout) == 2
    assert step_bytes(config, layout) == 64 * 24_576
    one, eight = (compute_of(config, layout_of(config, n)) for n in (1, 8))
    assert one.flops == pytest.approx(8 * eight.flops)


def test_what_is_computed_again():
    def again(*overrides):
        config = config_of(*overrides)
        return compute_of(config, layout_of(config, 8)).recomputed_flops

    full = again("--activation_checkpoint.mode=full")
    assert again("--activation_checkpoint.mode=none") == 0
    selective = "--activation_checkpoint.mode=selective"
    assert again(selective, "--activation_checkpoint.selective_ac_option=2") == full / 2
    assert again("--activation_checkpoint.mode=none", "--local_blocks.activation_checkpoint=full") > 0


@pytest.mark.parametrize(
    ("schedule", "bubble"), [("1F1B", 3 / 4), ("Interleaved1F1B", 3 / 8), ("InterleavedZeroBubble", 1 / 8)]
)
def test_bubbles(schedule, bubble):
    config = pipelined(4, f"--parallelism.pipeline_parallel_schedule={schedule}")
    assert compute_of(config, layout_of(config, 8)).bubble == pytest.approx(bubble)


def test_the_largest_stage_sets_the_pace():
    """A decoder of 31 % of a 1B cannot be cut: of 8 stages it is more than twice the mean."""
    two, eight = (compute_of(pipelined(n), layout_of(pipelined(n), 8)).imbalance for n in (2, 8))
    assert 1 <= two < 1.1
    assert eight > 2
