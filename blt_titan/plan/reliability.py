"""How often to save, from what a save costs and how often something fails.

The interval is Young's and Daly's first-order optimum (Daly 2006, doi:10.1016/j.future.2004.11.016): with a save of
`d` seconds and a mean time `M` between failures of the whole job, sqrt(2 d M) seconds of work between saves.
"""

import math

GPU_FAILURES_PER_HOUR = 419 / (54 * 24 * 16_384)
"""Unexpected interruptions by GPU-hour: 419 in 54 days on 16,384 GPUs (The Llama 3 herd of models, arXiv 2407.21783,
section 3.3.4)."""


def mean_time_between_failures(gpus: int, failures_per_gpu_hour: float) -> float:
    """Return the seconds from a failure of the job to the next; infinite if none fails."""
    return math.inf if failures_per_gpu_hour == 0 else 3600 / (failures_per_gpu_hour * gpus)


def best_interval(save_s: float, between_failures_s: float) -> float:
    """Return the seconds of work between two saves that waste least.

    >>> round(best_interval(30, 10 * 3600))
    1470
    """
    return math.sqrt(2 * save_s * between_failures_s)


def goodput(
    interval_s: float, save_s: float, restart_s: float, between_failures_s: float, *, lost_behind_s: float = 0.0
) -> float:
    """Return the share of time that is work which is not lost.

    A failure costs half an interval, what was done while the newest save was not stored yet, and the restart; no second
    one happens meanwhile.

    Args:
        interval_s: work between two saves.
        save_s: what a save takes from work.
        restart_s: from a failure to the next step.
        between_failures_s: mean time between failures.
        lost_behind_s: work that is done from a save until it is stored and counts.

    >>> round(goodput(1470, 30, 300, 36_000), 3)
    0.952
    """
    lost = 0.0 if math.isinf(between_failures_s) else (interval_s / 2 + lost_behind_s + restart_s) / between_failures_s
    return max(0.0, 1 - lost) * interval_s / (interval_s + save_s)
