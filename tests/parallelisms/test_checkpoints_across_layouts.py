"""A checkpoint of any layout continues in any other: parameters, optimizer state and the place in the data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import SINGLE, Layout
from tests.helpers.training_runs import losses, make_trainer, plain_name, train, whole

pytestmark = pytest.mark.slow

FIRST_LOSS_ATOL = 1e-5
"""The first loss after a resume: the same weights and rows, summed in another order."""
LATER_LOSS_ATOL = 1e-4
"""AdamW divides rounding noise by itself."""

# A -> B -> A, four ranks each, by tensor and pipeline changes.
PAIRS = {
    "fsdp_tables_to_tp2pp2": (Layout(dp_shard=4, hash_sharding="fsdp"), Layout(tp=2, pp=2)),
    "cp2tp2_to_dp2pp2": (Layout(cp=2, tp=2), Layout(dp_shard=2, pp=2)),
    "pp4_to_hsdp": (Layout(pp=4), Layout(dp_replicate=2, dp_shard=2)),
    "tp4_to_cp4": (Layout(tp=4), Layout(cp=4)),
    "interleaved_to_cp2tp2": (Layout(dp_shard=2, pp=2, schedule="Interleaved1F1B"), Layout(cp=2, tp=2)),
    "zero_bubble_to_dp2tp2": (Layout(cp=2, pp=2, schedule="InterleavedZeroBubble"), Layout(dp_shard=2, tp=2)),
}
QUICK = ("cp2tp2_to_dp2pp2",)
ASYNC = ("pp4_to_hsdp", "cp2tp2_to_dp2pp2")
LEGS = (4, 8, 12)

OVERRIDES = [
    "--data.streams=8",
    "--training.global_batch_size=8",
    "--optimizer.lr=4e-4",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=12",
    "--checkpoint.interval=4",
    "--validation.no-enable",
]


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state of this rank's stages, whole, by name."""
    state = {}
    for part, optimizer in zip(trainer.model_parts, trainer.optimizers.optimizers, strict=True):
        for name, parameter in part.named_parameters():
            state[plain_name(name)] = whole(parameter.detach()).clone()
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{plain_name(name)}/{key}"] = whole(value).clone()
    return state


def run_legs(out: str, overrides: list[str], pairs: list[str]) -> dict[str, list[str]]:
    """Train each pair A -> B -> A; return what was not bit-identical after loading."""
    different: dict[str, list[str]] = {}
    rank = torch.distributed.get_rank()
    for pair in pairs:
        a, b = PAIRS[pair]
        folder = f"{out}/{pair}"
        different[pair] = []
        mode = ["--checkpoint.async_mode=async"] if pair in ASYNC else []
        for layout, steps in zip((a, b, a), LEGS, strict=True):
            settings = [*overrides, *layout.overrides, *mode, f"--training.steps={steps}"]
            trainer = make_trainer(folder, *settings)
            if steps > LEGS[0]:
                trainer.checkpointer.load()
                assert trainer.step == steps - 4
                loaded = whole_state(trainer)
                assert any(key.endswith("/exp_avg") for key in loaded)
                saved: dict[str, torch.Tensor] = {}
                for file in Path(folder).glob(f"state-{trainer.step}-*.pt"):
                    saved |= torch.load(file)
                different[pair] += [key for key, value in loaded.items() if not torch.equal(value, saved[key])]
            trainer.train()
            torch.save(whole_state(trainer), f"{folder}/state-{steps}-{rank}.pt")
            trainer.close()
            torch.distributed.barrier()
    return different


@pytest.fixture(scope="module")
def undisturbed(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    overrides = [*small_run, *OVERRIDES, *SINGLE.overrides, "--training.steps=12"]
    run_distributed(train, 1, str(out), *overrides)
    return losses(out)


def check_pairs(pairs: list[str], out: Path, small_run: list[str], undisturbed: dict[int, float]) -> None:
    by_rank = run_distributed(run_legs, 4, str(out), [*small_run, *OVERRIDES], pairs, timeout_s=1800)
    for pair in pairs:
        for rank, different in enumerate(by_rank):
            assert not different[pair], f"{pair}, rank {rank}: not as saved: {different[pair][:5]}"
        got = losses(out / pair)
        assert got.keys() == undisturbed.keys()
        for step, loss in undisturbed.items():
            allowed = FIRST_LOSS_ATOL if step - 1 in (0, *LEGS) else LATER_LOSS_ATOL
            assert abs(got[step] - loss) <= allowed, f"{pair}, step {step}: {got[step]} and {loss}"


@pytest.mark.timeout(2000)
def test_to_another_layout_and_back(small_run, undisturbed, tmp_path):
    check_pairs(list(QUICK), tmp_path, small_run, undisturbed)


@pytest.mark.full
@pytest.mark.timeout(2000)
def test_the_other_pairs(small_run, undisturbed, tmp_path):
    check_pairs([pair for pair in PAIRS if pair not in QUICK], tmp_path, small_run, undisturbed)


def resume(out: str, overrides: list[str]) -> None:
    train(out, *overrides)


@pytest.mark.full
@pytest.mark.timeout(2000)
def test_other_numbers_of_ranks(small_run, undisturbed, tmp_path):
    """4 -> 1 -> 8 -> 2 ranks, 3 steps each."""
    layouts = (Layout(tp=2, pp=2), SINGLE, Layout(dp_shard=2, cp=2, tp=2), Layout(cp=2))
    for layout, steps in zip(layouts, (3, 6, 9, 12), strict=True):
        settings = [*small_run, *OVERRIDES, *layout.overrides, "--checkpoint.interval=3", f"--training.steps={steps}"]
        run_distributed(resume, layout.ranks, str(tmp_path), settings, timeout_s=600)
    got = losses(tmp_path)
    assert got.keys() == undisturbed.keys()
    for step, loss in undisturbed.items():
        assert abs(got[step] - loss) <= LATER_LOSS_ATOL, f"step {step}: {got[step]} and {loss}"


def write_seed(out: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    trainer = make_trainer(out, *overrides, "--checkpoint.create_seed_checkpoint")
    trainer.checkpointer.save(curr_step=0, last_step=True)
    state = whole_state(trainer)
    trainer.close()
    return state


def load_seed(out: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    # Other weights than the seed checkpoint's, so that it must have been loaded.
    trainer = make_trainer(out, *overrides, "--debug.seed=99")
    trainer.checkpointer.load()
    state = whole_state(trainer)
    trainer.close()
    return state


def test_a_seed_checkpoint_begins_any_layout(small_run, tmp_path):
    overrides = [*small_run, *OVERRIDES, "--training.steps=12"]
    [seed] = run_distributed(write_seed, 1, str(tmp_path), [*overrides, *SINGLE.overrides])
    ranks = run_distributed(load_seed, 2, str(tmp_path), [*overrides, *Layout(pp=2).overrides])
    loaded = ranks[0] | ranks[1]
    assert {name for name in seed if "/" not in name} <= loaded.keys()
    for name, parameter in seed.items():
        if "/" not in name:
            assert torch.equal(loaded[name], parameter), name
