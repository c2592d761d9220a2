"""Runs whose steps go wrong, on two ranks: what is left is, bit for bit, a run that never had the rows."""

import json
import logging
import math

import pytest
import torch
import torch.distributed as dist

from blt_titan.checkpoint.rollback import read_rollback
from blt_titan.training.failures import LossSpikeError, NonFiniteLossError
from blt_titan.training.trainer import BLTTrainer
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, make_trainer, metrics, whole

pytestmark = pytest.mark.slow

SKIP = ["--failure.on_nonfinite=skip", "--training.steps=6", "--checkpoint.interval=100"]
POISONED = 4
ROLLBACK = [
    *("--failure.on_spike=rollback", "--failure.spike_window=3", "--failure.rollback_steps=3"),
    *("--failure.max_rollbacks=1", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=0", "--training.steps=9"),
    *("--checkpoint.async_mode=async", "--training.dataloader.num_workers=1"),
]
SPIKED, BACK_AT = 6, 2
"""Step 6 spikes: step 2 is the newest that is three steps older, and the rows of steps 3 to 6 are passed over."""


def content(trainer: BLTTrainer) -> dict[str, bytes]:
    """All weights and the whole state of the optimizer, as bytes."""
    state = {name: p.detach() for part in trainer.model_parts for name, p in part.named_parameters()}
    state |= {k: v for k, v in trainer.optimizers.state_dict().items() if isinstance(v, torch.Tensor)}
    return {name: whole(value).cpu().contiguous().numpy().tobytes() for name, value in state.items()}


def gradient_of_one_rank(trainer: BLTTrainer, loss: torch.Tensor) -> torch.Tensor:
    """Make one number of a gradient infinite, on the last rank."""
    if dist.get_rank() == dist.get_world_size() - 1:
        gradient = next(p.grad for p in trainer.model_parts[0].parameters() if p.grad is not None)
        getattr(gradient, "to_local", lambda: gradient)().view(-1)[0] = math.inf
    return loss


def loss_of_one_rank(_: BLTTrainer, loss: torch.Tensor) -> torch.Tensor:
    """Make the loss NaN on the last rank, and no gradient."""
    return loss * math.nan if dist.get_rank() == dist.get_world_size() - 1 else loss


def spike(_: BLTTrainer, loss: torch.Tensor) -> torch.Tensor:
    return loss * 10


def make_poisoned(poison, steps: set[int], out: str, *overrides: str) -> tuple[BLTTrainer, dict[str, dict[str, bytes]]]:
    """A trainer whose micro-batches go wrong in some steps, and what it holds before and after such a step."""
    trainer, seen = make_trainer(out, *overrides), {}
    forward, update = trainer.forward_backward_step, trainer._update

    def poisoned(**kwargs):
        loss = forward(**kwargs)
        return poison(trainer, loss) if trainer.step in steps else loss

    def watched(loss, grad_norm, n_targets):
        if trainer.step in steps and trainer.step > 1:
            seen["before"] = content(trainer)
        update(loss, grad_norm, n_targets)
        if trainer.step in steps and trainer.step > 1:
            seen["after"] = content(trainer)

    trainer.forward_backward_step, trainer._update = poisoned, watched
    return trainer, seen


def end(trainer: BLTTrainer) -> tuple[dict[str, bytes], int]:
    found = content(trainer), int(trainer._targets_seen)
    trainer.close()
    return found


def skip_and_twin(out: str, overrides: list[str]) -> dict:
    """A run that skips a step, and one that is never given the rows, and has no word for skipping."""
    found: dict = {}
    trainer, seen = make_poisoned(gradient_of_one_rank, {POISONED}, f"{out}/skipped", *overrides, *SKIP)
    trainer.train()
    found["unchanged"] = seen["before"] == seen["after"]
    found["compiled"] = {name for part in trainer.model_parts for name in compiled_blocks(part)}
    found["skipped"] = end(trainer)
    twin = make_trainer(f"{out}/twin", *overrides, "--training.steps=6", "--checkpoint.no-enable")
    batches = twin.batch_generator(twin.dataloader)
    for twin.step in range(1, 7):
        if twin.step == POISONED:
            for _ in range(twin.gradient_accumulation_steps):
                next(batches)
            twin.lr_schedulers.step()
        else:
            twin.train_step(batches)
    found["twin"] = end(twin)
    return found


def compiled_blocks(part: torch.nn.Module) -> list[str]:
    return [name for name, block in part.named_modules() if getattr(block, "_compiled_call_impl", None) is not None]


def skip(out: str, overrides: list[str]) -> dict:
    found = skip_and_twin(out, overrides)

    # The count outlives a stop; too many end the run before it saves.
    trainer, _ = make_poisoned(
        gradient_of_one_rank, {POISONED}, f"{out}/resumed", *overrides, *SKIP[:1], "--training.steps=4"
    )
    trainer.train()
    trainer.close()
    bound = ["--failure.max_skipped=1", "--failure.skip_window=50"]
    resumed = make_trainer(f"{out}/resumed", *overrides, *SKIP, *bound)
    resumed.train()
    found["resumed"] = end(resumed)
    trainer, _ = make_poisoned(
        gradient_of_one_rank, {8}, f"{out}/resumed", *overrides, *SKIP, *bound, "--training.steps=9"
    )
    try:
        trainer.train()
    except NonFiniteLossError as error:
        found["bound"] = str(error)
    trainer.close()
    return found


def test_a_step_that_is_skipped_is_as_if_its_rows_had_not_been_there(small_run, tmp_path):
    found, other = run_distributed(skip, 2, str(tmp_path), small_run)
    assert found["unchanged"]
    assert other["unchanged"]
    assert found["skipped"] == found["twin"] == other["skipped"]
    assert found["resumed"] == found["twin"], "a resume"
    by_step, of_twin = losses(tmp_path / "skipped"), losses(tmp_path / "twin")
    assert list(by_step) == [1, 2, 3, 4, 5, 6]
    assert {step: loss for step, loss in by_step.items() if step != POISONED} == of_twin
    assert [line["skipped_steps"] for line in metrics(tmp_path / "skipped")] == [0, 0, 0, 1, 1, 1]
    assert [line["skipped_steps"] for line in metrics(tmp_path / "resumed")][3:6] == [1, 1, 1]
    [line] = map(json.loads, (tmp_path / "skipped/skipped.jsonl").read_text().splitlines())
    assert (line["step"], line["grad_norm"], line["first_row"], line["last_row"]) == (4, "inf", 12, 15)
    assert math.isfinite(line["loss_nats"])
    assert "number 2 of the last 50 steps that was skipped" in found["bound"]
    assert "step-6 was saved before" in found["bound"]
    assert "rank 1: " in other["bound"], "all ranks end"


def test_compiled_blocks_skip_a_step_as_if_its_rows_had_not_been_there(small_run, tmp_path):
    compiled = ["--compile.enable", "--activation_checkpoint.mode=none"]
    [found] = run_distributed(skip_and_twin, 1, str(tmp_path), [*small_run, *compiled])
    assert found["compiled"]
    assert found["unchanged"]
    assert found["skipped"] == found["twin"]
    by_step, of_twin = losses(tmp_path / "skipped"), losses(tmp_path / "twin")
    assert {step: loss for step, loss in by_step.items() if step != POISONED} == of_twin
    assert [line["skipped_steps"] for line in metrics(tmp_path / "skipped")] == [0, 0, 0, 1, 1, 1]


def skip_in_layouts(out: str, overrides: list[str]) -> dict[str, bool]:
    found = {}
    for name, poison, layout in (
        ("pp", loss_of_one_rank, ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"]),
        ("tp", loss_of_one_rank, ["--parallelism.tensor_parallel_degree=2"]),
        (
            "cp foreach",
            gradient_of_one_rank,
            ["--parallelism.context_parallel_degree=2", "--optimizer.implementation=foreach"],
        ),
        ("first step", gradient_of_one_rank, ["--optimizer.implementation=for-loop"]),
    ):
        settings = [*overrides, *layout, *SKIP[:1], "--training.steps=3", "--checkpoint.no-enable"]
        trainer, seen = make_poisoned(poison, {1 if name == "first step" else 2}, f"{out}/{name}", *settings)
        before = content(trainer) if name == "first step" else {}
        trainer.train()
        found[name] = trainer.watch.skipped_steps == 1
        if seen:
            found[name] &= seen["before"] == seen["after"]
            found[name] &= seen["after"] != content(trainer)  # and on it goes
        else:
            found[name] &= before.keys() == content(trainer).keys() and before != content(trainer)
        trainer.close()
    return found


def test_all_ranks_of_a_layout_skip_what_one_of_them_sees(small_run, tmp_path):
    for found in run_distributed(skip_in_layouts, 2, str(tmp_path), small_run):
        assert found == {"pp": True, "tp": True, "cp foreach": True, "first step": True}


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def roll_back_and_twin(out: str, overrides: list[str]) -> dict:
    """A run that goes back once, and one that was given the rows after the spike by hand."""
    found: dict = {}
    once, _ = make_poisoned(spike, {SPIKED}, f"{out}/once", *overrides, *ROLLBACK)
    load = once.checkpointer.load
    poisoned = once.forward_backward_step

    def load_and_heal(step: int = -1) -> bool:
        loaded = load(step)
        if step == BACK_AT:
            once.forward_backward_step = type(once).forward_backward_step.__get__(once)
            found["exclusions"] = once.checkpointer.exclude_from_loading
        return loaded

    once.checkpointer.load = load_and_heal
    once.train()
    found["healed"] = once.forward_backward_step is not poisoned
    found["once"] = end(once)

    # By hand: step 2 of a run that ends there, and then the rows after step 6.
    trainer = make_trainer(f"{out}/twin", *overrides, *ROLLBACK, "--training.steps=2")
    trainer.train()
    trainer.close()
    twin = make_trainer(f"{out}/twin", *overrides, *ROLLBACK)
    twin.checkpointer.load()
    batches = twin.batch_generator(twin.dataloader)
    for _ in range((SPIKED - BACK_AT) * twin.gradient_accumulation_steps):
        next(batches)
    for twin.step in range(BACK_AT + 1, 10):
        twin.train_step(batches)
    found["twin"] = end(twin)
    return found


def roll_back(out: str, overrides: list[str]) -> dict:
    said = Said()
    found = roll_back_and_twin(out, overrides)

    # A run that dies right after a rollback goes on as if it had not; what spikes again ends it, before it is saved.
    dying, _ = make_poisoned(spike, {SPIKED}, f"{out}/again", *overrides, *ROLLBACK)
    forward = dying.forward_backward_step

    def die(**kwargs):
        if dying.watch.rollbacks:
            raise InterruptedError
        return forward(**kwargs)

    dying.forward_backward_step = die
    try:
        dying.train()
    except InterruptedError:
        found["died in step"] = dying.step
    dying.close()
    again, _ = make_poisoned(spike, {SPIKED}, f"{out}/again", *overrides, *ROLLBACK)
    try:
        again.train()
    except LossSpikeError as error:
        found["bound"] = str(error)
    again.close()
    resumed = make_trainer(f"{out}/again", *overrides, *ROLLBACK)
    resumed.train()
    found["resumed"] = end(resumed)

    # Nothing to go back to.
    nothing = ["--failure.rollback_steps=6", "--training.steps=5"]
    early, _ = make_poisoned(spike, {5}, f"{out}/early", *overrides, *ROLLBACK, *nothing)
    early.train()
    early.close()
    found["said"] = said.lines
    return found


def test_a_rollback_is_a_run_that_was_given_the_rows_after_the_spike(small_run, tmp_path):
    found, other = run_distributed(roll_back, 2, str(tmp_path), small_run)
    assert found["healed"]
    assert found["once"] == found["twin"] == other["once"]
    assert found["died in step"] == BACK_AT + 1
    assert found["resumed"] == found["twin"], "a resume after a rollback"
    twin = losses(tmp_path / "twin")
    assert losses(tmp_path / "once") == twin
    assert losses(tmp_path / "again") == twin
    assert list(twin) == list(range(1, 10))
    assert [line["rollbacks"] for line in metrics(tmp_path / "once")] == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    [line] = map(json.loads, (tmp_path / "once/skipped.jsonl").read_text().splitlines())
    assert (line["why"], line["step"], line["spike_step"]) == ("spike", BACK_AT, SPIKED)
    assert (line["first_row"], line["last_row"]) == (8, 23)
    checkpoints = tmp_path / "once/checkpoint"
    beside = read_rollback(checkpoints / f"step-{BACK_AT}")
    assert beside is not None
    assert (beside.rows_served, beside.rollbacks) == (24, 1)
    assert [path.name for path in checkpoints.glob("abandoned-*/*")] == ["step-4"], "the spike itself is not saved"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [f"step-{n}" for n in (2, 4, 6, 8, 9)]
    assert "gone back 1 times; failure.max_rollbacks = 1 may be. step-4 was saved before" in found["bound"]
    assert "no checkpoint is failure.rollback_steps = 6 steps older than the spike of step 5" in "\n".join(
        found["said"]
    )
    last = metrics(tmp_path / "early")[-1]
    assert (last["step"], last["rollbacks"], last["loss_spikes"]) == (5, 0, 1)
    assert (tmp_path / "early/checkpoint/step-5/.metadata").is_file()


def test_both_stages_of_a_pipeline_roll_back_to_what_a_run_given_the_later_rows_is(small_run, tmp_path):
    """Only the last stage knows the loss; both go back, and on with the same rows."""
    stages = ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"]
    first, last = run_distributed(roll_back_and_twin, 2, str(tmp_path), [*small_run, *stages])
    for rank in (first, last):
        assert rank["healed"]
        assert rank["once"] == rank["twin"]
    assert first["once"][0].keys() != last["once"][0].keys(), "each holds its own stage"
    twin = losses(tmp_path / "twin")
    assert losses(tmp_path / "once") == twin
    assert list(twin) == list(range(1, 10))
    assert [line["rollbacks"] for line in metrics(tmp_path / "once")] == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    [line] = map(json.loads, (tmp_path / "once/skipped.jsonl").read_text().splitlines())
    assert (line["first_row"], line["last_row"]) == (8, 23)
