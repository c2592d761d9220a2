"""What deserves a warning in the lines that a run logs: arithmetic on their figures, without clock, file or device.

In: of each line its figures, and those of each rank. Out: figures for the metrics, and alerts.

The decision that is not obvious: what is normal is what this run did before. A rank is compared with the ranks that do
the same, by the median of its last lines, so that one slow line is no alert:

    forward of rank 0   10 ms  11 ms  10 ms  10 ms  12 ms    median 10 ms
    forward of rank 1   14 ms  10 ms  15 ms  14 ms  14 ms    median 14 ms: 1.4 times as long, an alert above 1.3

Bytes per second must stay low for some lines; a gradient norm is an alert at once, because it is of one step.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from blt_titan.job_config import Monitor

WINDOW = 50
"""Lines that a running median looks back."""
FEWEST = 10
"""Lines before which there is no median to compare with."""
RANK_LINES = 5
"""Lines of a rank that are looked at together."""
LOW_LINES = 3
"""Lines in a row with few bytes per second, before that is an alert."""
MEMORY_OVER = 1.1
"""Times the predicted memory that pass."""


@dataclass(frozen=True)
class RankFigures:
    """What one rank measured since the line before."""

    forward_s: float
    """Forward of its blocks in the step of the line, without what it waited for from others."""
    data_wait_s: float
    """Waited for rows."""
    memory_gib: float = 0.0
    """Tensors at the peak; 0 where nothing measures them."""


@dataclass(frozen=True)
class Line:
    """The figures of a logged line that are looked at."""

    step: int
    seconds: float
    """Since the line before."""
    saving_s: float
    """What of these training waited for while a checkpoint was saved."""
    saves: int
    """Checkpoints that were begun since the line before; one beside the training may be waited for in a later line."""
    n_bytes: float
    """Targets of all ranks since the line before."""
    grad_norm: float
    ranks: Sequence[RankFigures]


@dataclass(frozen=True)
class Alert:
    """Something that a person should look at."""

    kind: str
    subject: str
    """What it is about beside the run: a rank. Alerts of one kind and subject are the same alert."""
    sentence: str


class RunWatch:
    """Looks at the lines of a run, one after another.

    Args:
        settings: `[monitor]`.
        hosts: of each rank.
        stages: of the pipeline; its ranks are consecutive, and other stages do other work.
        sharing: consecutive ranks that share rows (cp x tp), and wait for each other within a block.
    """

    def __init__(self, settings: Monitor, *, hosts: Sequence[str], stages: int = 1, sharing: int = 1):
        self._settings, self._hosts, self._sharing = settings, hosts, sharing
        self._ranks_of_stage = max(1, len(hosts) // stages)
        self._rates: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._forwards: list[deque[float]] = [deque(maxlen=RANK_LINES) for _ in hosts]
        self._waits: list[deque[float]] = [deque(maxlen=RANK_LINES) for _ in hosts]
        self._low_lines = 0
        self._seconds, self._saving_s, self._saves = 0.0, 0.0, 0
        self._lines = 0

    def look(self, line: Line) -> tuple[dict[str, float], list[Alert]]:
        """Return what there is to say of the next line: figures, those that exist yet, and alerts."""
        figures: dict[str, float] = {}
        alerts: list[Alert] = []
        self._lines += 1
        for part in (self._gradient, self._saving, self._memory):
            alerts += part(line, figures)
        # The first line of a start has warmed up, and compiled.
        if self._lines > 1:
            for part in (self._throughput, self._forward, self._data):
                alerts += part(line, figures)
        return figures, alerts

    def _throughput(self, line: Line, figures: dict[str, float]) -> Iterator[Alert]:
        seconds = line.seconds - line.saving_s
        rate = line.n_bytes / seconds if seconds > 0 else 0.0
        if len(self._rates) >= FEWEST and (usual := median(self._rates)) > 0:
            ratio = figures["throughput_ratio"] = rate / usual
            self._low_lines = self._low_lines + 1 if ratio < self._settings.throughput_drop else 0
            if self._low_lines >= LOW_LINES:
                yield Alert(
                    "throughput",
                    "",
                    f"{rate:,.0f} bytes/s, {ratio:.0%} of the usual {usual:,.0f}, for {self._low_lines} lines in a row",
                )
        self._rates.append(rate)

    def _gradient(self, line: Line, figures: dict[str, float]) -> Iterator[Alert]:
        if not math.isfinite(line.grad_norm):
            return
        if len(self._norms) >= FEWEST and (usual := median(self._norms)) > 0:
            ratio = figures["grad_norm_ratio"] = line.grad_norm / usual
            if 0 < self._settings.gradient_spike < ratio:
                yield Alert(
                    "gradient",
                    "",
                    f"the gradient norm is {line.grad_norm:.4g}, {ratio:.1f} times the usual {usual:.4g}: look at the "
                    "data of this step, or lower optimizer.lr",
                )
        self._norms.append(line.grad_norm)

    def _saving(self, line: Line, figures: dict[str, float]) -> Iterator[Alert]:
        self._seconds += line.seconds
        self._saving_s += line.saving_s
        self._saves += line.saves
        if not self._saves or self._seconds <= 0:
            return
        share = figures["saving_share"] = self._saving_s / self._seconds
        # One save says little of how often there will be one.
        if self._saves > 1 and 0 < self._settings.saving < share:
            yield Alert(
                "saving",
                "",
                f"saving has taken {share:.0%} of the time since the start, {self._saving_s / self._saves:.1f} s each: "
                "raise checkpoint.interval, or save while training goes on (checkpoint.async_mode)",
            )

    def _memory(self, line: Line, figures: dict[str, float]) -> Iterator[Alert]:
        if (predicted := self._settings.predicted_memory_gib) is None or not line.ranks:
            return
        measured = [figures_of.memory_gib for figures_of in line.ranks]
        rank = measured.index(max(measured))
        ratio = figures["memory_ratio"] = measured[rank] / predicted
        if ratio > MEMORY_OVER:
            yield Alert(
                "memory",
                str(rank),
                f"{self._name(rank)} had {measured[rank]:.1f} GiB of tensors at its peak, {ratio:.2f} times the "
                f"monitor.predicted_memory_gib = {predicted:g}",
            )

    def _forward(self, line: Line, figures: dict[str, float]) -> Iterator[Alert]:
        for times, of_rank in zip(self._forwards, line.ranks, strict=True):
            times.append(of_rank.forward_s)
        if len(self._forwards[0]) < RANK_LINES or self._ranks_of_stage < 2:
            return
        seconds = [median(times) for times in self._forwards]
        slowest, ratio, of_others = -1, 0.0, 0.0
        for first in range(0, len(seconds), self._ranks_of_stage):
            same = range(first, first + self._ranks_of_stage)
            rank = max(same, key=lambda r: seconds[r])
            others = median(seconds[r] for r in same if r != rank)
            if others > 0 and seconds[rank] / others > ratio:
                slowest, ratio, of_others = rank, seconds[rank] / others, others
        if slowest < 0:
            return
        figures["slowest_rank"], figures["slowest_rank_ratio"] = slowest, ratio
        if 0 < self._settings.slow_rank < ratio:
            shares = ", or a rank that shares its rows," if self._sharing > 1 else ""
            yield Alert(
                "slow rank",
                str(slowest),
                f"{self._name(slowest)}{shares} is slow: its forward takes {seconds[slowest] * 1e3:,.1f} ms, "
                f"{ratio:.2f} times the {of_others * 1e3:,.1f} ms of others, who wait for it",
            )

    def _data(self, line: Line, figures: dict[str, float]) -> Iterator[Alert]:
        if not line.ranks or line.seconds <= 0:
            return
        for shares, of_rank in zip(self._waits, line.ranks, strict=True):
            shares.append(of_rank.data_wait_s / line.seconds)
        if len(self._waits[0]) < RANK_LINES:
            return
        waited = [median(shares) for shares in self._waits]
        rank = waited.index(max(waited))
        if len(waited) > 1:
            figures["slowest_data_rank"] = rank
        figures["slowest_data_wait_share"] = waited[rank]
        if 0 < self._settings.data_wait < waited[rank]:
            others = [share for r, share in enumerate(waited) if r != rank]
            beside = f" (others: {median(others):.0%})" if others else ""
            yield Alert(
                "data",
                str(rank),
                f"{self._name(rank)} waits for its rows for {waited[rank]:.0%} of the time{beside}: raise "
                "training.dataloader.num_workers, or look at the file system of its host",
            )

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"
