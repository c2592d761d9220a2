"""What is judged to have gone wrong, when, and that an update can be left out without a trace."""

import json
import logging
import math
import random
import statistics
import types

import pytest
import torch

from blt_titan.checkpoint.find import latest_before
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.rollback import Rollback, read_rollback
from blt_titan.job_config import Failure
from blt_titan.titan import build_optimizers
from blt_titan.training import failures
from blt_titan.training.failures import LossSpikeError, NonFiniteLossError, StepWatch, apply_update
from blt_titan.training.metrics import JsonLines
from blt_titan.training.spikes import LossSpikes

G = 4
"""Rows of a step."""


@pytest.fixture(autouse=True)
def _rank_0(monkeypatch):
    monkeypatch.setattr(failures.dist, "get_rank", lambda: 0)


def watch_of(tmp_path, device_type="cpu", **settings) -> StepWatch:
    log = JsonLines(tmp_path / "skipped.jsonl")
    return StepWatch(Failure(**settings), device_type=device_type, log=log, checkpoints=tmp_path / "checkpoint")


def note(watch: StepWatch, step: int, loss: float = 3.0, norm: float = 1.0) -> None:
    watch.note(step, torch.tensor(loss), torch.tensor(norm), range(G * (step - 1), G * step))


def skipped(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"norm": math.inf}, {"loss": -math.inf, "norm": math.nan}])
def test_a_step_that_is_not_finite_stops_the_run_and_says_what_was_saved(bad, tmp_path):
    (tmp_path / "checkpoint/step-2").mkdir(parents=True)
    (tmp_path / "checkpoint/step-2/.metadata").touch()
    (tmp_path / "checkpoint/step-3").mkdir()
    watch = watch_of(tmp_path)
    for step in (1, 2):
        note(watch, step)
    watch.look()
    watch.check()
    note(watch, 3, **bad)
    note(watch, 4, loss=math.nan)
    watch.look()
    with pytest.raises(NonFiniteLossError, match=r"step 3 is not finite .*rows 8 to 11\).*; step-2 was saved before"):
        watch.check()


def test_a_host_that_runs_ahead_hears_two_steps_later_and_of_all_when_it_must(tmp_path):
    watch = watch_of(tmp_path, "cuda", on_nonfinite="skip")
    heard = []
    for step in range(1, 7):
        note(watch, step, loss=math.nan if step in (2, 6) else 3.0)
        watch.look()
        heard.append(watch.skipped_steps)
    assert heard == [0, 0, 0, 1, 1, 1]
    watch.look_at_all()
    assert watch.skipped_steps == 2


def test_skipped_steps_are_noted_with_their_rows_and_bounded_within_a_window(tmp_path):
    watch = watch_of(tmp_path, on_nonfinite="skip", max_skipped=2, skip_window=5)
    for step in range(1, 11):
        note(watch, step, *((math.nan, math.inf) if step in (2, 5, 9, 10) else ()))
        watch.look()
        watch.check()  # 5, 9 and 10 lie within 6 steps
    assert watch.metrics() == {"skipped_steps": 4}
    assert skipped(tmp_path)[0] == {
        **{"step": 2, "why": "not finite", "loss_nats": "nan", "grad_norm": "inf", "first_row": 4, "last_row": 7}
    }
    resumed = watch_of(tmp_path, on_nonfinite="skip", max_skipped=2, skip_window=5)
    resumed.load(watch.state())
    note(resumed, 13, loss=math.inf)
    resumed.look()
    assert resumed.skipped_steps == 5
    with pytest.raises(NonFiniteLossError, match=r"number 3 of the last 5 steps .* failure\.max_skipped = 2 may be"):
        resumed.check()


def bounds_by_hand(losses: list[float], sigmas: float, window: int) -> list[float]:
    """The formula of `failure.spike_sigmas`, from the beginning for each step."""
    bounds, taken = [], []
    for loss in losses:
        mean = variance = 0.0
        for n, x in enumerate(taken, 1):
            a, d = 1 / min(n, window), x - mean
            mean, variance = mean + a * d, (1 - a) * (variance + a * d**2)
        bounds.append(mean + sigmas * math.sqrt(variance) if len(taken) >= window else math.inf)
        taken.append(min(loss, bounds[-1]))
    return bounds


def test_spikes_are_judged_by_the_formula_and_go_on_from_a_state():
    random.seed(0)
    losses = [3 + random.gauss(0, 0.05) + (2 if 60 <= i < 63 else 0) for i in range(120)]
    spikes, found = LossSpikes(sigmas=6, window=20), []
    for i, loss in enumerate(losses):
        if i == 61:  # in the middle of a spike
            resumed = LossSpikes(sigmas=6, window=20)
            resumed.load(json.loads(json.dumps(spikes.state())))
            spikes = resumed
        found.append(spikes.look(loss))
    bounds = bounds_by_hand(losses, 6, 20)
    assert [i for i, bound in enumerate(found) if bound is not None] == [60, 61, 62]
    assert [bounds[i] for i in (60, 61, 62)] == pytest.approx([found[i] for i in (60, 61, 62)], rel=1e-12)
    # Over the first window, mean and variance are the plain ones.
    assert bounds[20] == pytest.approx(statistics.mean(losses[:20]) + 6 * statistics.pstdev(losses[:20]))


def test_a_loss_that_stays_higher_is_usual_in_the_end_and_one_that_falls_is_no_spike():
    spikes = LossSpikes(sigmas=4, window=20)
    falling = [spikes.look(6 * 0.97**i) for i in range(60)]
    assert falling == [None] * 60
    spikes = LossSpikes(sigmas=4, window=20)
    assert [spikes.look(3.0 + 0.01 * (i % 3)) for i in range(60)] == [None] * 60
    rises = [spikes.look(5.0 + 0.01 * (i % 3)) is not None for i in range(200)]
    assert rises[0]
    assert not any(rises[100:])


def test_a_spike_is_said_once_and_a_rollback_is_bounded(tmp_path, caplog):
    settings = {"on_spike": "rollback", "spike_window": 5, "spike_sigmas": 4.0, "max_rollbacks": 1}
    watch = watch_of(tmp_path, **settings)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 20):
            note(watch, step, loss=9.0 if step in (10, 11, 15) else 3 + 0.1 * (step % 2))
            watch.look()
    assert [record.message[:37] for record in caplog.records] == [
        f"the loss of step {step} is a spike: 9.000" for step in (10, 15)
    ]
    assert watch.metrics() == {"loss_spikes": 2, "rollbacks": 0}
    assert watch.spike is not None
    assert (watch.spike.step, watch.spike.rows) == (10, range(36, 40)), "the first"
    spike = watch.spike
    watch.go_back(spike, 7, range(28, 40))
    assert skipped(tmp_path) == [
        {
            **{"step": 7, "why": "spike", "loss_nats": 9.0, "grad_norm": 1.0, "first_row": 28, "last_row": 39},
            "spike_step": 10,
        }
    ]
    assert json.loads(watch.state())["rollbacks"] == 1
    with pytest.raises(LossSpikeError, match=r"gone back 1 times; failure\.max_rollbacks = 1 may be\. nothing was"):
        watch.go_back(spike, 7, range(28, 40))


def model_and_optimizers(implementation: str, name: str):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        model.weight[0, 0] = -0.0
    settings = types.SimpleNamespace(
        **{"name": name, "lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.3},
        **{"implementation": implementation, "early_step_in_backward": False},
    )
    dims = types.SimpleNamespace(ep_enabled=False)
    return model, build_optimizers([model], settings, dims)  # pyright: ignore[reportArgumentType]


def content(model, optimizers) -> dict[str, bytes]:
    state = {**model.state_dict(), **optimizers.state_dict()}
    return {k: v.detach().numpy().tobytes() for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_an_update_that_is_left_out_leaves_no_trace(implementation, name):
    """Steps 1 and 3 of four are wrong; what is left is a run of the other two."""
    model, optimizers = model_and_optimizers(implementation, name)
    twin, twins = model_and_optimizers(implementation, name)
    before = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
    for step in (1, 2, 3, 4):
        wrong = step % 2 == 1
        for one, of_one in ((model, optimizers), (twin, twins)):
            of_one.zero_grad()
            one(torch.full((2, 5), float(step))).square().sum().backward()
        if wrong:
            model.weight.grad = torch.full_like(model.weight, math.nan)
        apply_update(optimizers, torch.tensor(wrong))
        assert not hasattr(optimizers.optimizers[0], "found_inf")
        if not wrong:
            twins.step()
        if step == 1:
            assert {k: v.numpy().tobytes() for k, v in model.state_dict().items()} == before
            state = [value for value in optimizers.state_dict().values() if isinstance(value, torch.Tensor)]
            assert len(state) == 6
            assert not any(value.any() for value in state), "a checkpoint makes the state that is missing by a step"
        else:
            assert content(model, optimizers) == content(twin, twins), step


def test_what_is_written_beside_a_checkpoint_is_read_again_or_named(tmp_path):
    assert read_rollback(tmp_path) is None
    rollback = Rollback(rows_served=40, positions=[[1, 2, 3, 0], [0, 5, 3, 0]], rollbacks=2)
    rollback.write(tmp_path)
    assert read_rollback(tmp_path) == rollback
    for content in ("", "[]", '{"rows_served": 40}', '{"rows_served":1,"positions":[[1],[2,3]],"rollbacks":1}'):
        (tmp_path / "rollback.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"rollback\.json: says where the data goes on .*; restore it, or"):
            read_rollback(tmp_path)


def test_the_last_step_before_another_is_none_where_there_is_none(tmp_path):
    assert latest_before(tmp_path, 100) is None
    (tmp_path / "step-90").mkdir()
    (tmp_path / "step-90/.metadata").write_bytes(b"damaged")
    assert latest_before(tmp_path, 100) is None
