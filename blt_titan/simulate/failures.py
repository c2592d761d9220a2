"""What share of a run's time is work that is kept, by how often it saves: stragglers and failures drawn event by event.

Steps. A step takes as long as its slowest GPU: a GPU takes `step_s` * (1 + X), X exponential with mean `straggle`, and
the slowest of n is drawn at once, since the greatest of n draws is below x with probability F(x)^n.

Failures. They come after exponential gaps, of the whole job, whatever it does: a failure while it restarts begins the
restart again. After one the job takes `restart_s` and goes on from the newest save that was stored by then, at

    gap     |--restart--|--k steps--|save|--k steps--|save|--k st-X        two saves: 2 k steps are kept
                                    ^ begins          stored `save_s` after that; training waits for `blocked_s` of it

Since gaps know nothing of the past and the job begins each at a save, histories are gaps one beside another, and numpy
draws all of them at once. The same gaps and steps meet every interval, so intervals differ by themselves, not by
chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blt_titan.plan.reliability import best_interval, goodput

GAPS = 2000
"""Failures in a history."""
_TAPE = 1 << 16
"""Steps that are drawn for a history; it goes round."""
_FACTORS = 2.0 ** np.arange(-3, 3.01, 0.5)
"""Intervals that are tried, by Young's and Daly's."""


@dataclass(frozen=True)
class Operation:
    """What a job meets."""

    gpus: int
    step_s: float
    """A step of a GPU that nothing holds up."""
    straggle: float
    """Mean share of a step by which a GPU is late."""
    blocked_s: float
    """What a save holds up training."""
    save_s: float
    """From the beginning of a save until it is stored."""
    restart_s: float
    between_failures_s: float
    """Mean time between failures of the whole job; infinite if nothing fails."""

    @property
    def mean_step_s(self) -> float:
        """Return the mean of the slowest GPU's step: the n-th harmonic number times the mean lateness on top."""
        return self.step_s * (1 + self.straggle * float(np.sum(1 / np.arange(1, self.gpus + 1))))

    @property
    def young_daly_s(self) -> float:
        """Return the seconds of work between saves by Young's and Daly's formula."""
        return best_interval(self.blocked_s, self.between_failures_s)

    @property
    def young_daly_steps(self) -> float:
        """Return the same in steps, at least one; infinite if nothing fails."""
        return max(1.0, self.young_daly_s / self.mean_step_s)

    def between_saves(self, interval: int) -> float:
        """Return what a save adds to `interval` steps: no save begins before the one before it is stored."""
        return max(self.blocked_s, self.save_s - interval * self.mean_step_s)


@dataclass(frozen=True)
class Interval:
    """What saving every so many steps comes to; shares of the whole time, means over histories."""

    steps: int
    seconds: float
    """Work between two saves."""
    goodput: float
    """Work that is kept."""
    spread: float
    """Standard error of that."""
    saving: float
    """Training waited for saves."""
    restarting: float
    lost: float
    """Work that was done again."""
    formula: float
    """The goodput of `plan`'s formula."""


@dataclass(frozen=True)
class Outcome:
    """Goodput by interval."""

    intervals: list[Interval]
    young_daly_steps: int
    """Young's and Daly's, among the intervals."""
    best_steps: int
    behind_best: float
    """Goodput that Young's and Daly's interval gives away to the best that was tried."""
    behind_best_error: float
    """Standard error of that."""

    def of(self, steps: int) -> Interval:
        """Return what an interval comes to."""
        return next(interval for interval in self.intervals if interval.steps == steps)


def draw_steps(operation: Operation, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return how long steps take, each as long as its slowest GPU: fp64 [count]."""
    # 1 - u**(1/n) without the digits that are lost near 1.
    late = -np.log(-np.expm1(np.log(1 - rng.random(count)) / operation.gpus))
    return operation.step_s * (1 + operation.straggle * late)


def intervals_to_try(operation: Operation, own: int, run_steps: int) -> list[int]:
    """Return intervals around Young's and Daly's, and the run's own; in steps, ascending."""
    amid = own if math.isinf(operation.between_failures_s) else operation.young_daly_steps
    tried = amid * _FACTORS
    inside = np.clip(np.round(tried), 1, max(1, run_steps)).astype(np.int64)
    return sorted({*inside.tolist(), min(own, run_steps)})


def with_the_formula_s(intervals: Sequence[int], operation: Operation, run_steps: int) -> list[int]:
    """Return intervals that were asked for and Young's and Daly's, by which they are measured."""
    if math.isinf(operation.between_failures_s):
        return sorted(set(intervals))
    return sorted({*intervals, min(max(1, round(operation.young_daly_steps)), run_steps)})


def outcome(
    operation: Operation, intervals: Sequence[int], *, run_steps: int, histories: int, seed: int, gaps: int = GAPS
) -> Outcome:
    """Draw histories and return the goodput of each interval.

    Args:
        operation: what the job meets.
        intervals: steps between two saves.
        run_steps: of the run; without failures, the history is the run.
        histories: how many.
        seed: of the draws.
        gaps: failures of a history.
    """
    formula_steps = min(operation.young_daly_steps, max(intervals))
    young_daly = min(intervals, key=lambda steps: abs(math.log(steps / formula_steps)))
    shares = np.array(
        [
            _history(operation, intervals, run_steps, np.random.default_rng([seed, number]), gaps)
            for number in range(histories)
        ]
    )  # [histories, intervals, kept saving restarting lost]
    means = shares.mean(axis=0)
    errors = _standard_error(shares[:, :, 0])
    best = int(np.argmax(means[:, 0]))
    behind = shares[:, best, 0] - shares[:, list(intervals).index(young_daly), 0]
    found = []
    for steps, mean, error in zip(intervals, means, errors, strict=True):
        seconds = steps * operation.mean_step_s
        formula = goodput(
            seconds,
            operation.blocked_s,
            operation.restart_s,
            operation.between_failures_s,
            lost_behind_s=max(0.0, operation.save_s - operation.blocked_s),
        )
        kept, saving, restarting, lost = mean.tolist()
        found.append(Interval(steps, seconds, kept, float(error), saving, restarting, lost, formula))
    return Outcome(found, young_daly, intervals[best], float(behind.mean()), float(_standard_error(behind)))


def _standard_error(values: np.ndarray) -> np.ndarray:
    return values.std(axis=0, ddof=min(1, len(values) - 1)) / math.sqrt(len(values))


def _history(
    operation: Operation, intervals: Sequence[int], run_steps: int, rng: np.random.Generator, gaps: int
) -> np.ndarray:
    """Return the shares of a history's time: kept, saving, restarting, lost; fp64 [intervals, 4]."""
    tape = _Tape(draw_steps(operation, _TAPE, rng))
    if math.isinf(operation.between_failures_s):
        work = tape.seconds(np.zeros(1, np.int64), np.array([run_steps]))[0]
        waited = np.array([run_steps // steps * operation.between_saves(steps) for steps in intervals])
        none = np.zeros_like(waited)
        return np.stack([work / (work + waited), waited / (work + waited), none, none], axis=1)
    gap = rng.exponential(operation.between_failures_s, gaps)
    begins = rng.integers(_TAPE, size=gaps)
    total = gap.sum()
    restarting = np.minimum(gap, operation.restart_s).sum() / total
    shares = []
    for steps in intervals:
        saves = stored_saves(operation, tape, steps, gap - operation.restart_s, begins)
        kept = tape.seconds(begins, saves * steps).sum() / total
        saving = saves.sum() * operation.between_saves(steps) / total
        shares.append([kept, saving, restarting, 1 - kept - saving - restarting])
    return np.array(shares)


def stored_saves(operation: Operation, tape: "_Tape", steps: int, room_s: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Return how many saves are stored in some time, int64 [gaps].

    Args:
        operation: what the job meets.
        tape: how long steps take.
        steps: between two saves.
        room_s: time after the restart, fp64 [gaps]; may be negative.
        begins: where on the tape the first step is, int64 [gaps].
    """
    wait = operation.between_saves(steps)
    fewest = np.zeros(len(room_s), np.int64)
    # No step is shorter than one that nothing holds up.
    most = np.maximum(room_s // (steps * operation.step_s + wait), 0).astype(np.int64) + 1
    while (fewest < most).any():
        saves = (fewest + most + 1) // 2
        stored_s = tape.seconds(begins, saves * steps) + (saves - 1) * wait + operation.save_s
        fits = stored_s <= room_s
        fewest, most = np.where(fits, saves, fewest), np.where(fits, most, saves - 1)
    return fewest


class _Tape:
    """Times of steps, one after another and round again."""

    def __init__(self, steps_s: np.ndarray):
        self._ends = np.concatenate([[0.0], np.cumsum(steps_s)])

    def seconds(self, begins: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Return what `count` steps take from each place, fp64."""
        rounds, ends = np.divmod(begins + count, len(self._ends) - 1)
        return rounds * self._ends[-1] + self._ends[ends] - self._ends[begins]
