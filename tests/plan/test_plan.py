"""Plans of dry runs: against the sizes that the model and the layout make by hand."""

import dataclasses
import json

import pytest
import torch

from blt_titan.commands import plan as command
from blt_titan.config.check import RunConfigError, load_run_config
from blt_titan.config.rules.target import this_machine
from blt_titan.dry_run.memory import GRADIENTS, OPTIMIZER, PARAMETERS, Memory
from blt_titan.dry_run.result import DryRun
from blt_titan.dry_run.run import dry_run
from blt_titan.model.blt import BLT
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.plan.network import NETWORKS
from blt_titan.plan.plan import AGREEING_S, Assumptions, make_plan
from blt_titan.plan.report import report, searched_report
from blt_titan.plan.search import search, splits

DEBUG = [
    *("--job.config_file=train_configs/debug.toml", "--training.dataset_path=x"),
    *("--training.local_batch_size=1", "--training.global_batch_size=8"),
]
ASSUMED = Assumptions("h100", NETWORKS["ib400"], mfu=0.4, price=2.0, failures_per_gpu_hour=1e-4)
STATE_BYTES = 16
"""What a parameter takes: itself, its gradient and two moments, in fp32."""


def config_of(*overrides):
    return load_run_config([*DEBUG, *overrides])


def number_of_parameters(flavor: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in BLT(BLT_FLAVORS[flavor]).parameters())


class Measured:
    """Stands in for dry runs: a rank's states, and activations by its rows and their slices."""

    def __init__(self, activation_bytes: float = 1e9):
        self.activation_bytes = activation_bytes
        self.asked: list[tuple] = []

    def __call__(self, config, world_size, gpu, *, rank, name, **_) -> DryRun:
        self.asked.append((rank, config.training.local_batch_size, config.activation_checkpoint.mode))
        parallelism = config.parallelism
        slices = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
        kept = {"none": 1.0, "selective": 0.7, "full": 0.4}[config.activation_checkpoint.mode]
        states = STATE_BYTES * number_of_parameters(config.model.flavor) / world_size
        activations = self.activation_bytes * config.training.local_batch_size * kept / slices
        at_peak = {PARAMETERS: states / 4, GRADIENTS: states / 4, OPTIMIZER: states / 2, "activations": activations}
        peak = round(sum(at_peak.values()))
        memory = Memory(peak, "backward", {}, {k: round(v) for k, v in at_peak.items()}, {}, {})
        return DryRun(name, world_size, gpu, "", {}, 0, memory, [], [], [], False, None, 0.0, rank=rank, device="cpu")


def test_a_plan_by_hand():
    config = config_of("--training.steps=1000")
    plan = make_plan(config, 4, ASSUMED, name="x", measure=Measured())
    args = BLT_FLAVORS["debug"]
    rows = config.training.global_batch_size
    patch_bytes = config.data.segment_bytes / config.data.segment_patches
    flops = 3 * args.forward_flops_per_byte(config.training.seq_len, patch_bytes)
    assert plan.parameters == number_of_parameters("debug")
    assert plan.computing_parameters == plan.parameters - 6 * args.hash_rows * args.local_dim
    assert plan.step_bytes == rows * config.training.seq_len
    assert plan.time.seconds == pytest.approx(flops * plan.step_bytes / 4 / (989e12 * 0.4))
    assert plan.mfu == pytest.approx(0.4)
    assert plan.checkpoint.size_bytes == 12 * plan.parameters
    assert plan.checkpoint.save_s == pytest.approx(AGREEING_S + plan.checkpoint.size_bytes / 2e9)
    assert plan.gpu_hours == pytest.approx(4 * 1000 * plan.time.seconds / plan.checkpoint.goodput / 3600)
    assert plan.loader_rows_per_s == pytest.approx(rows / plan.time.seconds)
    said = report(plan)
    assert "fits" in said.splitlines()[-1]
    assert "any rank" in said
    json.dumps(plan.to_json(), allow_nan=False)


def test_a_plan_without_failures_is_sound_json():
    never = dataclasses.replace(ASSUMED, failures_per_gpu_hour=0.0)
    said = make_plan(config_of(), 4, never, name="x", measure=Measured()).to_json()
    assert json.loads(json.dumps(said, allow_nan=False))["checkpoint"]["between_failures_s"] is None


def test_each_replica_copies_what_it_holds():
    """A save beside the training waits for a rank's copy: twice as much where two replicas share the ranks."""
    sharded, replicated = (
        make_plan(
            config_of(f"--parallelism.data_parallel_replicate_degree={replicas}", "--checkpoint.async_mode=async"),
            *(4, ASSUMED),
            name="x",
            measure=Measured(),
        ).checkpoint
        for replicas in (1, 2)
    )
    assert replicated.blocked_s - AGREEING_S == pytest.approx(2 * (sharded.blocked_s - AGREEING_S))
    assert replicated.size_bytes == sharded.size_bytes


def test_what_does_not_fit_is_said():
    plan = make_plan(config_of(), 4, ASSUMED, name="x", measure=Measured(activation_bytes=1e12))
    assert not plan.fits
    assert "TOO MUCH" in report(plan)
    assert report(plan).endswith("does not fit")


def test_ranks_of_a_pipeline_are_shown():
    config = config_of("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4")
    measured = Measured()
    plan = make_plan(config, 4, ASSUMED, name="x", measure=measured)
    assert [rank for rank, _, _ in measured.asked] == [0, 2]
    assert "rank 0 (first" in report(plan)
    assert "rank 2 (last" in report(plan)


def test_splits_are_sound_and_smallest_first():
    def load(overrides):
        return config_of(*overrides)

    found = [dict(word.removeprefix("--parallelism.").split("=") for word in split) for split in splits(load, 8, 8)]
    degrees = [
        tuple(int(split[f"{name}_parallel_degree"]) for name in ("pipeline", "tensor", "context")) for split in found
    ]
    assert degrees[0] == (1, 1, 1)
    products = [a * b * c for a, b, c in degrees]
    assert products == sorted(products)
    assert not any(tp == 8 for _, tp, _ in degrees), "debug has four heads"


def test_a_search_finds_what_fits_and_is_fastest():
    def load(overrides):
        return config_of(*overrides)

    roomy = search(load, 2, ASSUMED, name="x", tries=2, measure=Measured(activation_bytes=1e9))
    assert roomy.best[0].plan.layout.name() == "fsdp 2"
    assert "--activation_checkpoint.mode=none" in roomy.best[0].overrides
    seconds = [found.plan.time.seconds for found in roomy.best]
    assert seconds == sorted(seconds)
    # Each row takes 100 GB: with one in two slices 50, and with everything checkpointed 40 of one.
    tight = search(load, 2, ASSUMED, name="x", tries=2, measure=Measured(activation_bytes=100e9))
    assert all(found.plan.fits for found in tight.best)
    assert "no layout was found" in searched_report(
        search(load, 2, ASSUMED, name="x", tries=2, measure=Measured(activation_bytes=1e12))
    )


def test_a_search_over_wrong_settings_says_what_is_wrong():
    def load(overrides):
        return config_of("--training.seq_len=0", *overrides)

    with pytest.raises(RunConfigError, match=r"training\.seq_len = 0: must be") as caught:
        search(load, 4, ASSUMED, name="x", measure=Measured())
    assert "parallel_degree" not in str(caught.value), "no split of the ranks is at fault"
    assert command.main(["--config", "debug", "--world-size", "2", "--search", "--training.seq_len=0"]) == 2


def test_the_command_is_asked_wrongly():
    for arguments in (["--config", "debug"], ["--config", "debug", "--world-size", "0"], ["--mfu", "2"]):
        assert command.main(arguments) == 2


@pytest.mark.slow
def test_the_command_plans_what_a_rank_holds_and_moves(capsys):
    """FSDP of four: states are a quarter, and weights but for hash tables are gathered twice and reduced once."""
    code = command.main(
        ["--config", "debug", "--world-size", "4", "--json", "--training.global_batch_size=8", "--compile.no-enable"]
    )
    said = json.loads(capsys.readouterr().out)
    assert code == 0
    (rank,) = said["ranks"]
    parameters = said["parameters"]
    held = rank["memory"]["between_steps"]
    # FSDP pads what does not divide, and the allocator rounds up.
    assert held[PARAMETERS] == pytest.approx(4 * parameters / 4, rel=0.01)
    assert held[OPTIMIZER] == pytest.approx(8 * parameters / 4, rel=0.01)
    moved = {one["kind"]: one["moved_bytes"] for one in rank["sent"] if one["in_micro_batch"]}
    weights = 4 * said["computing_parameters"] * 3 / 4
    assert moved["reduce-scatter"] == pytest.approx(weights, rel=0.01)
    # The last group that forward gathers is still there for backward.
    assert weights < moved["all-gather"] <= 2 * weights * 1.01
    assert {one["axis"] for one in rank["sent"]} == {"fsdp"}


@pytest.mark.slow
def test_what_all_ranks_share_is_named_by_what_it_is_for():
    """Slices of rows over all ranks: attention's gathers, which a layer waits for, and FSDP's, which it does not."""
    config = config_of("--parallelism.context_parallel_degree=2", "--compile.no-enable")
    found = dry_run(config, 2, kernels=False, quiet=True, rank=1, device="cpu", target=this_machine())
    args, positions = BLT_FLAVORS["debug"], config.training.seq_len // config.data.segment_bytes
    positions *= config.data.segment_patches
    gathers = {one.axis: one.moved_bytes for one in found.sent if one.kind == "all-gather" and one.in_micro_batch}
    assert gathers.keys() == {"fsdp", "cp"}
    # Keys and values of each global layer, of which the other rank has half; what little else there is, is masks.
    kept = 2 * args.global_layers * positions * args.global_dim * 4 / 2
    assert kept <= gathers["cp"]
    assert {one.axis for one in found.sent} == {"fsdp", "cp"}


@pytest.mark.slow
def test_a_pipeline_is_run_dry_stage_by_stage():
    config = config_of("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4")
    first, last = (
        dry_run(config, 2, kernels=False, quiet=True, rank=rank, device="cpu", target=this_machine()) for rank in (0, 1)
    )
    assert first.parameters + last.parameters == number_of_parameters("debug")
    args, patches = BLT_FLAVORS["debug"], config.training.seq_len // config.data.segment_bytes
    patches *= config.data.segment_patches
    boundary = 4 * 4 * (patches * args.global_dim + config.training.seq_len * args.local_dim)

    def moved(found, kind):
        return sum(one.moved_bytes for one in found.sent if one.kind == kind and one.in_micro_batch)

    assert moved(first, "send") == moved(last, "receive") == boundary
    assert moved(first, "receive") == moved(last, "send") == boundary, "gradients are as large"
