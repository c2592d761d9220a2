"""Spikes of the loss: steps far above what the steps before them were like.

In: the loss of each step, in order. Out: for each, the bound that it is above, if it is. The state is four numbers,
which a checkpoint keeps, so that a run that resumes judges as if it had never stopped. `failure.spike_sigmas` in
`job_config.py` has the formula.

>>> spikes = LossSpikes(sigmas=4, window=5)
>>> [spikes.look(loss) is not None for loss in (3.0, 3.2, 3.1, 2.9, 3.0, 3.1, 4.4, 4.1, 3.0)]
[False, False, False, False, False, False, True, True, False]
"""

import math
from typing import Any


class LossSpikes:
    """Judges the loss of each step by a mean and a variance over about the last steps, in which spikes are capped.

    Args:
        sigmas: how many deviations above the mean a spike is.
        window: steps that mean and variance reach over; the first so many are not judged.
    """

    def __init__(self, *, sigmas: float, window: int):
        self._sigmas, self._window = sigmas, window
        self._steps, self._mean, self._variance = 0, 0.0, 0.0
        self.in_spike = False
        """The step looked at last was above its bound."""

    def look(self, loss: float) -> float | None:
        """Judge a step's loss, which is finite, and take it into mean and variance; return the bound if it is above."""
        bound = math.inf
        if self._steps >= self._window:
            bound = self._mean + self._sigmas * math.sqrt(self._variance)
        self.in_spike = loss > bound
        self._steps += 1
        weight = 1 / min(self._steps, self._window)
        above_mean = min(loss, bound) - self._mean
        self._mean += weight * above_mean
        self._variance = (1 - weight) * (self._variance + weight * above_mean**2)
        return bound if self.in_spike else None

    def state(self) -> dict[str, Any]:
        """Return what a run that resumes goes on from."""
        return {"steps": self._steps, "mean": self._mean, "variance": self._variance, "in_spike": self.in_spike}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._steps, self._mean, self._variance = state["steps"], state["mean"], state["variance"]
        self.in_spike = state["in_spike"]
