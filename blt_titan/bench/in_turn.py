"""Peers of one work, measured in turn: warm-ups, then rounds in which each makes a step, and medians."""

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

from blt_titan.bench.options import Options
from blt_titan.bench.peers import PeerSpec
from blt_titan.bench.rows import Work
from blt_titan.bench.worker import PeerFailedError, Step, Worker
from blt_titan.progress import ProgressBar

WARM_UPS = 1
"""Steps that are not measured: they compile, and touch memory for the first time."""
GIVES_BACK_FROM_BYTES = 16_385
"""From so many bytes in a step on, processes give free memory back while the others compute."""


def spec_of(name: str, work: Work, options: Options) -> PeerSpec:
    """Return what the process of a peer builds."""
    gives_back = options.device == "cpu" and work.total_bytes >= GIVES_BACK_FROM_BYTES
    return PeerSpec(
        name,
        options.args,
        work,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        seed=options.seed,
        gives_back=gives_back,
    )


def measure_in_turn(specs: dict[str, PeerSpec], options: Options, title: str) -> dict[str, dict[str, Any]]:
    """Measure steps of several peers, a step of each in every round.

    Args:
        specs: what is measured, by a name for each.
        options: how often; and whether to show progress.
        title: of the progress bar.

    Returns:
        For each name `seconds` (of processor time on a CPU, by the clock on a GPU), all of them and `median_s`, the
        median by the clock, bytes per second, and the loss; or `failed`, why there are none.
    """
    steps: dict[str, list[Step]] = {name: [] for name in specs}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack, _bar(title, (WARM_UPS + options.repeats) * len(specs), options) as bar:
        workers = {name: stack.enter_context(Worker(spec)) for name, spec in specs.items()}
        for _ in range(WARM_UPS + options.repeats):
            for name, worker in workers.items():
                if name not in failed:
                    try:
                        steps[name].append(worker.step())
                    except PeerFailedError as error:
                        failed[name] = str(error)
                bar.update()
    return {
        name: {"failed": failed[name]} if name in failed else _figures(steps[name][WARM_UPS:], specs[name])
        for name in specs
    }


def measure_memory(specs: dict[str, PeerSpec], options: Options, title: str, *, peaks: int) -> dict[str, Any]:
    """Measure the peak of memory of each peer, one process after another.

    Returns:
        For each name all peaks and `peak_bytes`, the highest; or `failed`.
    """
    found: dict[str, Any] = {}
    with _bar(title, len(specs), options) as bar:
        for name, spec in specs.items():
            try:
                with Worker(spec) as worker:
                    for _ in range(WARM_UPS):
                        worker.step()
                    measured = [worker.peak_bytes() for _ in range(peaks)]
                found[name] = {"peaks": measured, "peak_bytes": max(measured)}
            except PeerFailedError as error:
                found[name] = {"failed": str(error)}
            bar.update()
    return found


@contextlib.contextmanager
def _bar(title: str, total: int, options: Options) -> Iterator[ProgressBar]:
    with ProgressBar(total=total, desc=title, unit="step", leave=False, disable=not options.progress) as bar:
        yield bar


def _figures(steps: list[Step], spec: PeerSpec) -> dict[str, Any]:
    taken = [step.cpu_s if spec.device == "cpu" else step.wall_s for step in steps]
    median_s = statistics.median(taken)
    figures: dict[str, Any] = {
        "seconds": taken,
        "median_s": median_s,
        "median_wall_s": statistics.median(step.wall_s for step in steps),
        "bytes_per_s": spec.work.total_bytes / median_s,
    }
    loss = steps[-1].loss
    return figures | ({} if loss != loss else {"loss": loss})
