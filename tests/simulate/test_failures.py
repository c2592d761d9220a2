"""Goodput under failures: against closed forms, and against a loop over events."""

import math
from dataclasses import replace

import numpy as np
import pytest

from blt_titan.plan.reliability import best_interval
from blt_titan.simulate.failures import (
    _TAPE,
    Operation,
    _Tape,
    draw_steps,
    intervals_to_try,
    outcome,
    stored_saves,
    with_the_formula_s,
)

SIGMAS = 4.5
"""A right program passes each comparison with a drawn mean but once in 150,000."""
SYNC = Operation(
    gpus=64, step_s=2.0, straggle=0.0, blocked_s=30.0, save_s=30.0, restart_s=300.0, between_failures_s=20_000.0
)
ASYNC = replace(SYNC, straggle=0.05, blocked_s=1.0, save_s=90.0)


def expected_goodput(operation: Operation, steps: int) -> float:
    """Exponential failures that also strike restarts and saves (Daly 2006, equation 20 divided by the work)."""
    work, mean = steps * operation.step_s, operation.between_failures_s
    segment = work + operation.blocked_s
    return work / (mean * math.exp(operation.restart_s / mean) * math.expm1(segment / mean))


def test_without_failures_only_saves_cost():
    never = replace(SYNC, between_failures_s=math.inf)
    for interval in outcome(never, [10, 70, 1000], run_steps=1000, histories=2, seed=0).intervals:
        work, saving = 2000.0, 1000 // interval.steps * 30.0
        assert interval.goodput == pytest.approx(work / (work + saving), rel=1e-12)
        assert interval.goodput == pytest.approx(
            interval.formula, rel=1e-3 if interval.steps == 70 else 1e-12, abs=0.02
        )
        assert interval.lost == interval.restarting == 0.0


@pytest.mark.parametrize("between_failures_s", [2_000.0, 20_000.0, 500_000.0])
def test_exponential_failures_have_the_known_expectation(between_failures_s):
    operation = replace(SYNC, between_failures_s=between_failures_s)
    tried = intervals_to_try(operation, 500, 100_000)
    found = outcome(operation, tried, run_steps=100_000, histories=32, seed=1)
    for interval in found.intervals:
        expected = expected_goodput(operation, interval.steps)
        assert abs(interval.goodput - expected) < SIGMAS * interval.spread + 1e-12, interval
        shares = interval.goodput + interval.saving + interval.restarting + interval.lost
        assert shares == pytest.approx(1.0)
        assert interval.lost >= 0


def events(operation: Operation, steps_s: np.ndarray, steps: int, room_s: float, begin: int) -> int:
    """Saves stored in a time, step by step and save by save."""
    now, stored, in_flight = 0.0, 0, []
    wait = operation.between_saves(steps)
    for step in range(10**6):
        now += steps_s[(begin + step) % len(steps_s)]
        if (step + 1) % steps == 0:
            in_flight.append(now + operation.save_s)
            now += wait
        stored += sum(end <= room_s for end in in_flight)
        in_flight = [end for end in in_flight if end > room_s]
        if now > room_s:
            return stored
    raise AssertionError


@pytest.mark.parametrize("operation", [SYNC, ASYNC], ids=["sync", "async"])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_saves_are_those_of_a_loop_over_events(operation, steps):
    rng = np.random.default_rng(steps)
    steps_s = draw_steps(operation, 200, rng)
    gaps = np.concatenate([[-5.0, 0.0, 1e-9], rng.exponential(4000.0, 60)])
    begins = rng.integers(200, size=len(gaps))
    found = stored_saves(operation, _Tape(steps_s), steps, gaps, begins)
    expected = [
        events(operation, steps_s, steps, gap, begin) if gap > 0 else 0 for gap, begin in zip(gaps, begins, strict=True)
    ]
    assert found.tolist() == expected
    assert max(expected) > 1


def test_the_slowest_of_many_is_drawn_as_the_greatest_of_their_draws():
    operation = replace(SYNC, gpus=6, straggle=0.2)
    drawn = np.sort(draw_steps(operation, 40_000, np.random.default_rng(0)))
    each = operation.step_s * (1 + np.random.default_rng(1).exponential(0.2, (40_000, 6)))
    by_hand = np.sort(each.max(axis=1))
    # Kolmogorov and Smirnov: two samples of one distribution are nearer than this but once in 10,000.
    grid = np.concatenate([drawn, by_hand])
    apart = np.abs(np.searchsorted(drawn, grid) - np.searchsorted(by_hand, grid)).max() / len(drawn)
    assert apart < 2.23 * math.sqrt(2 / len(drawn))
    assert drawn.mean() == pytest.approx(operation.mean_step_s, rel=0.01)
    many = replace(operation, gpus=1024, straggle=0.01)
    steps = draw_steps(many, _TAPE, np.random.default_rng(2))
    assert abs(steps.mean() - many.mean_step_s) < SIGMAS * steps.std() / math.sqrt(len(steps))
    assert (steps > many.step_s).all()


def test_young_and_daly_are_near_the_best():
    found = outcome(SYNC, intervals_to_try(SYNC, 300, 10**6), run_steps=10**6, histories=16, seed=3)
    assert found.young_daly_steps == round(best_interval(30.0, 20_000.0) / 2.0)
    assert found.young_daly_steps / 2 <= found.best_steps <= found.young_daly_steps * 2
    assert 0 <= found.behind_best < 0.002
    far = [found.intervals[0].goodput, found.intervals[-1].goodput]
    assert max(far) < found.of(found.best_steps).goodput - 0.05


def test_intervals_that_are_asked_for_are_measured_by_the_formula_s():
    tried = with_the_formula_s([500, 900], SYNC, 10**6)
    best = round(best_interval(30.0, 20_000.0) / 2.0)
    assert tried == sorted([best, 500, 900])
    assert outcome(SYNC, tried, run_steps=10**6, histories=4, seed=3).young_daly_steps == best
    assert with_the_formula_s([900, 500], replace(SYNC, between_failures_s=math.inf), 10**6) == [500, 900]


@pytest.mark.parametrize("between_failures_s", [2_000.0, 20_000.0])
def test_a_store_that_is_slow_to_keep_costs_what_the_formula_says(between_failures_s):
    operation = replace(ASYNC, between_failures_s=between_failures_s, restart_s=0.0)
    found = outcome(operation, [100], run_steps=10**6, histories=32, seed=4).intervals[0]
    # The formula leaves out failures that strike twice: products of two small shares.
    lost = (found.seconds / 2 + operation.save_s) / between_failures_s
    assert found.formula == pytest.approx(found.goodput, abs=SIGMAS * found.spread + lost**2)
    assert found.formula < 1 - operation.save_s / between_failures_s


def test_a_slow_store_makes_a_save_wait_for_the_one_before():
    assert ASYNC.between_saves(10_000) == ASYNC.blocked_s
    assert ASYNC.between_saves(1) == pytest.approx(90.0 - ASYNC.mean_step_s)
