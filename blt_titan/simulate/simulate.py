"""A simulation: all rows of all ranks through a resume, what they need and have, and goodput under failures."""

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.store.manifest import parse_manifest
from blt_titan.dry_run.cards import CARDS
from blt_titan.plan.as_json import finite_or_none
from blt_titan.plan.layout import compute_of, layout_of
from blt_titan.plan.plan import ASSUMED_MFU, Assumptions, Checkpoint, checkpoint_of, count_parameters
from blt_titan.plan.time import step_time
from blt_titan.simulate.conservation import Streams, deal_streams, faults, gather_streams, run_part
from blt_titan.simulate.data import SyntheticShards, Text, open_text
from blt_titan.simulate.failures import Operation, Outcome, intervals_to_try, outcome, with_the_formula_s
from blt_titan.simulate.ranks import Part, Served, World, deal, gather, in_processes, save
from blt_titan.simulate.rates import WorkerRates, stream_bytes, worker_rates
from blt_titan.simulate.settings import choose_steps, resumed_world, text_of, world_of


@dataclass(frozen=True)
class Ask:
    """What is asked for."""

    world_size: int
    steps: int | None = None
    resume_on: int | None = None
    """None takes the same world."""
    resume_at: int | None = None
    text_bytes: int = 4_500_000_000_000
    record_batch_bytes: int = 256 * 1024
    step_s: float | None = None
    """None predicts it: computing alone."""
    straggle: float = 0.01
    intervals: tuple[int, ...] = ()
    histories: int = 16
    seed: int = 0
    workers: int = 2


@dataclass(frozen=True)
class Opened:
    """What opening the data takes in each process."""

    shards: int
    record_batches: int
    text_bytes: int
    manifest_bytes: int
    parse_s: float
    fingerprint_s: float
    order_s: float
    """To say which record batch a stream reads next."""


@dataclass(frozen=True)
class State:
    """The loader's state in a checkpoint."""

    file_bytes: int
    state_s: float
    save_s: float
    load_s: float
    first_batch_s: float
    stream_bytes: float


@dataclass(frozen=True)
class Conserved:
    """Whether every row came once, and of how many."""

    rows: int
    text_bytes: int
    steps: int
    resume_at: int
    amid_record_batches: int
    """Streams that went on inside a record batch."""
    more_than_once: int
    """Streams that gave a row after the resume."""
    faults: list[str]
    seconds: float


@dataclass(frozen=True)
class Simulation:
    """What was found."""

    name: str
    before: World
    after: World
    streams: int
    own_interval: int
    """As `checkpoint.interval`."""
    adapted: list[str]
    """Settings that the world after took otherwise, because it must."""
    opened: Opened
    step_s: float
    predicted: bool
    """Whether the step's time is."""
    loader_workers: int
    online: bool
    """Whether rows wait for a model that scores them."""
    rates: WorkerRates
    state: State
    conserved: Conserved
    operation: Operation
    checkpoint: Checkpoint
    outcome: Outcome
    processes: int

    @property
    def needed_rows_per_s(self) -> float:
        """Return the rows that a data-parallel rank takes in a second."""
        return self.before.global_batch / self.step_s / self.before.dp_size

    @property
    def had_rows_per_s(self) -> float:
        """Return the rows that its workers make, if each has a core like those here; the trainer lays them out."""
        made = self.rates.steady * max(1, self.loader_workers)
        return min(made, self.rates.laid_out) if self.loader_workers else 1 / (1 / made + 1 / self.rates.laid_out)

    def to_json(self) -> dict[str, Any]:
        """Return all of it, as JSON takes it; what is infinite is null."""
        found: dict[str, Any] = asdict(self) | {
            "needed_rows_per_s": self.needed_rows_per_s,
            "had_rows_per_s": self.had_rows_per_s,
        }
        return finite_or_none(found)


def simulate(config: RunConfig, ask: Ask, assumptions: Assumptions, *, name: str) -> Simulation:
    """Simulate a run.

    Args:
        config: its settings, as `load_run_config` returns them.
        ask: what is asked for.
        assumptions: about cards, stores and failures, as for a plan.
        name: what it is called.

    Raises:
        RunConfigError: the settings are not sound on so many GPUs, or there is no such step.
        DataError: the text is too little for the run's streams.
    """
    before = world_of(config, ask.world_size)
    after, adapted = (before, []) if ask.resume_on is None else resumed_world(config, ask.resume_on)
    steps, resume_at = choose_steps(config.data.streams, before, after, ask.steps, ask.resume_at)
    text = text_of(config, ask.text_bytes, ask.record_batch_bytes, ask.seed)
    opened = _open(text)
    online = text.rule.by_entropy and config.patching.source == "online"
    wanted = 0 if online else config.training.dataloader.num_workers
    loader = RowLoader(
        open_text(text).source,
        open_text(text).order,
        dp_size=before.dp_size,
        rows_per_batch=before.rows_per_batch,
        num_workers=wanted,
    )
    rates = worker_rates(text, before.rows_per_batch)
    conserved, state = conserve(text, before, after, steps, resume_at, workers=ask.workers)

    layout = layout_of(config, ask.world_size)
    step_s = ask.step_s or _computing_s(config, ask.world_size, assumptions)
    checkpoint = checkpoint_of(config, layout, count_parameters(config)[0], step_s, assumptions)
    operation = Operation(
        gpus=ask.world_size,
        step_s=step_s,
        straggle=ask.straggle,
        blocked_s=checkpoint.blocked_s,
        save_s=checkpoint.save_s,
        restart_s=assumptions.restart_s,
        between_failures_s=checkpoint.between_failures_s,
    )
    run_steps, own = config.training.steps, config.checkpoint.interval
    tried = (
        with_the_formula_s(ask.intervals, operation, run_steps)
        if ask.intervals
        else intervals_to_try(operation, own, run_steps)
    )
    return Simulation(
        name=name,
        before=before,
        after=after,
        streams=text.streams,
        own_interval=own,
        adapted=adapted,
        opened=opened,
        step_s=step_s,
        predicted=ask.step_s is None,
        loader_workers=loader.num_workers,
        online=online,
        rates=rates,
        state=state,
        conserved=conserved,
        operation=operation,
        checkpoint=checkpoint,
        outcome=outcome(operation, tried, run_steps=run_steps, histories=ask.histories, seed=ask.seed),
        processes=ask.workers,
    )


def conserve(
    text: Text, before: World, after: World, steps: int, resume_at: int, *, workers: int
) -> tuple[Conserved, State]:
    """Run all ranks through a save and a resume, and compare every row with those of a run that never stops.

    Args:
        text: what they read.
        before: the ranks up to the save.
        after: the ranks from there.
        steps: of both together.
        resume_at: the step that is saved.
        workers: processes.

    Raises:
        DataError: the ranks cannot go on.
    """
    began, row_bytes = time.perf_counter(), text.shape.n_bytes
    n_first, n_second = resume_at * before.global_batch, (steps - resume_at) * after.global_batch
    with tempfile.TemporaryDirectory(prefix="blt-titan-simulate-") as folder:
        tasks: list[Part | Streams] = [*deal(text, before, resume_at, None, workers)]
        what = f"{before.world_size:,} GPUs"
        first = gather(in_processes(run_part, tasks, workers=workers, n_bytes=n_first * row_bytes, what=what))
        checkpoint, save_began = Path(folder) / f"step-{resume_at}", time.perf_counter()
        save(first.state, checkpoint)
        save_s = time.perf_counter() - save_began
        file_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
        going_on = deal(text, after, steps - resume_at, checkpoint, workers)
        # In the same processes: what one that never stops reads.
        tasks = [*going_on, *deal_streams(text, n_first + n_second, workers)]
        what = f"{after.world_size:,} GPUs go on, and one that never stops"
        n_bytes = (n_first + 2 * n_second) * row_bytes
        found = in_processes(run_part, tasks, workers=workers, n_bytes=n_bytes, what=what)
    second = gather(found[: len(going_on)], n_first)
    whole = gather_streams(n_first + n_second, found[len(going_on) :])
    digests, n_ids = (np.concatenate([getattr(part, key) for part in (first, second)]) for key in ("digests", "n_ids"))
    inside = first.state["positions"][:, 1] > 0
    went_on = np.zeros(text.streams, bool)
    went_on[np.arange(len(first.digests), len(digests)) % text.streams] = True
    conserved = Conserved(
        rows=len(digests),
        text_bytes=int(n_ids.sum()),
        steps=steps,
        resume_at=resume_at,
        amid_record_batches=int((inside & went_on).sum()),
        more_than_once=int(went_on.sum()),
        faults=faults(text, digests, n_ids, second.state["positions"], whole),
        seconds=time.perf_counter() - began,
    )
    return conserved, _state(first, second, file_bytes, save_s, stream_bytes(text))


def _state(first: Served, second: Served, file_bytes: int, save_s: float, stream_bytes: float) -> State:
    return State(
        file_bytes=file_bytes,
        state_s=first.state_s,
        save_s=save_s,
        load_s=second.load_s,
        first_batch_s=second.first_batch_s,
        stream_bytes=stream_bytes,
    )


def _open(text: Text) -> Opened:
    data = open_text(text)
    shards = data.source.shards
    manifests = [one.manifest for one in shards.sets if isinstance(one, SyntheticShards)]  # pyright: ignore
    written = [manifest.to_json().encode() for manifest in manifests]
    times = [time.perf_counter()]
    for one in written:
        parse_manifest(one, "manifest.json")
    times.append(time.perf_counter())
    _ = shards.fingerprint
    times.append(time.perf_counter())
    picks = 1000
    for pick in range(picks):
        data.order.record_batch(pick % text.streams, pick)
    times.append(time.perf_counter())
    parse_s, fingerprint_s, order_s = np.diff(times).tolist()
    return Opened(
        shards=sum(len(manifest.splits["train"]) for manifest in manifests),
        record_batches=len(shards),
        text_bytes=shards.text_bytes,
        manifest_bytes=sum(map(len, written)),
        parse_s=parse_s,
        fingerprint_s=fingerprint_s,
        order_s=order_s / picks,
    )


def _computing_s(config: RunConfig, world_size: int, assumptions: Assumptions) -> float:
    mfu = assumptions.mfu or ASSUMED_MFU
    compute = compute_of(config, layout_of(config, world_size))
    flops_per_s = CARDS[assumptions.gpu].bf16_flops
    return step_time(compute, (), assumptions.network, flops_per_s=flops_per_s, mfu=mfu).seconds


def default_workers() -> int:
    """Return the processes that a simulation takes if nothing is said: the cores that this one may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
