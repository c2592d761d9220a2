"""The loaders of all data-parallel ranks of a run, a rank after the other, in a few processes.

Ranks do not talk between two saves, so each makes its rows of all steps up to one, then the next rank does: a process
holds the streams of one rank. What is kept of a row is a digest of its ids, patches and segments, and how many ids.
Ranks that share rows (context, tensor and pipeline parallelism) make the same ones, and are one rank here.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from blt_titan.checkpoint.read import SafeLoadPlanner, SafeReader
from blt_titan.data.prepare.worker_pool import run_tasks
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.packing import Row
from blt_titan.data.store.errors import DataError
from blt_titan.simulate.data import Text, open_text

Report = Callable[[int], None]
Task = TypeVar("Task")
Result = TypeVar("Result")
_TASKS_OF_A_WORKER = 6


@dataclass(frozen=True)
class World:
    """Data-parallel ranks, and how the rows of a step are dealt to them."""

    world_size: int
    dp_size: int
    rows_per_batch: int
    """As `training.local_batch_size`."""
    global_batch: int
    """Rows of a step."""


@dataclass(frozen=True)
class Part:
    """Some ranks of a world, and what they do."""

    text: Text
    world: World
    ranks: tuple[int, ...]
    steps: int
    checkpoint: str | None
    """What they go on from."""


@dataclass(frozen=True)
class Served:
    """What ranks handed out, and their state after it."""

    digests: np.ndarray
    """Digest of each row in the run's order, uint64 [rows]."""
    n_ids: np.ndarray
    """Ids of each row, int64 [rows]."""
    state: dict[str, Any]
    """What a checkpoint would hold."""
    state_s: float
    """To say a rank's state, the longest."""
    load_s: float
    """To read a rank's state from the checkpoint and take it over, the longest."""
    first_batch_s: float
    """To a rank's first batch, the longest; patches are not cut but copied."""


def digest(row: Row) -> int:
    """Return a digest of what a row holds, patches and segments included: 64 bits."""
    hashed = hashlib.sha256(row.ids.data)
    hashed.update(row.cuts.data)
    hashed.update(row.segment_ends.data)
    return int.from_bytes(hashed.digest()[:8], "little")


def in_processes(
    function: Callable[[Task, Report], Result], tasks: Sequence[Task], *, workers: int, n_bytes: int, what: str
) -> list[Result]:
    """Call `function(task, report)` for every task in a few processes, under a progress bar over bytes.

    Raises:
        DataError: a process was killed.
    """
    try:
        done = run_tasks(
            function, tasks, workers=workers, total_bytes=n_bytes, done_bytes=0, description=what, progress=True
        )
        return [result for _, result in done]
    except DataError as error:
        if not isinstance(error.__cause__, BrokenProcessPool):
            raise
        said = "a process was killed, perhaps because memory ran out: start again with fewer --workers"
        raise DataError(said) from None


def parts(count: int, workers: int) -> list[np.ndarray]:
    """Deal 0..count-1 into consecutive parts, a few for each worker."""
    return [part for part in np.array_split(np.arange(count), workers * _TASKS_OF_A_WORKER) if len(part)]


def deal(text: Text, world: World, steps: int, checkpoint: Path | None, workers: int) -> list[Part]:
    """Return what there is to do for all ranks of a world to make their rows of some steps.

    Args:
        text: what they read.
        world: the ranks.
        steps: how many.
        checkpoint: what they go on from; None begins.
        workers: processes that will do it.
    """
    path = None if checkpoint is None else str(checkpoint)
    return [Part(text, world, tuple(part.tolist()), steps, path) for part in parts(world.dp_size, workers)]


def gather(found: Sequence[dict[str, Any]], first_row: int = 0) -> Served:
    """Put together what the parts of a world handed out, in the order of its ranks, from a row of the run on."""
    # A rank's rows are a column: row n of the run is rank n mod dp's.
    columns = (np.concatenate([one[key] for one in found]).T for key in ("digests", "n_ids"))
    digests, n_ids = (np.roll(rows, -first_row, axis=1).ravel() for rows in columns)
    longest = {key: max(one[key] for one in found) for key in ("state_s", "load_s", "first_batch_s")}
    return Served(digests, n_ids, _merged([one["state"] for one in found]), **longest)


def save(state: dict[str, Any], checkpoint: Path) -> None:
    """Save the loader's state as a run does, alone."""
    with _alone():
        save_state({"dataloader": state}, checkpoint_id=str(checkpoint), no_dist=True)


def serve_part(part: Part, report: Report) -> dict[str, Any]:
    """Make the rows of some ranks, one after the other.

    Raises:
        DataError: they cannot go on from the checkpoint.
    """
    data, world = open_text(part.text), part.world
    row_bytes = part.text.shape.n_bytes
    rows = part.steps * world.global_batch // world.dp_size
    digests, n_ids = np.zeros((len(part.ranks), rows), np.uint64), np.zeros((len(part.ranks), rows), np.int64)
    times: dict[str, float] = dict(state_s=0.0, load_s=0.0, first_batch_s=0.0)
    states: list[dict[str, Any]] = []
    for place, rank in enumerate(part.ranks):
        loader = RowLoader(
            data.source, data.order, dp_rank=rank, dp_size=world.dp_size, rows_per_batch=world.rows_per_batch
        )
        began = time.perf_counter()
        if part.checkpoint is not None:
            _load(loader, part.checkpoint)
            times["load_s"] = max(times["load_s"], time.perf_counter() - began)
        batches = loader.packed_batches()
        began = time.perf_counter()
        for first in range(0, rows, world.rows_per_batch):
            for i, row in enumerate(next(batches), first):
                digests[place, i], n_ids[place, i] = digest(row), row.n_ids
            if not first:
                times["first_batch_s"] = max(times["first_batch_s"], time.perf_counter() - began)
            report(world.rows_per_batch * row_bytes)
        del batches  # and the text that its streams hold
        began = time.perf_counter()
        states.append(loader.state_dict())
        times["state_s"] = max(times["state_s"], time.perf_counter() - began)
        if len(states) == 2:
            states = [_merged(states)]
    return dict(digests=digests, n_ids=n_ids, state=_merged(states), **times)


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one table of several ranks': an entry is -1 to those that do not own it."""
    assert len({state["rows_served"] for state in states}) == 1
    return states[0] | {"positions": np.max([state["positions"] for state in states], axis=0)}


def _load(loader: RowLoader, checkpoint: str) -> None:
    state = {"dataloader": loader.state_dict()}
    with _alone():
        load(state, storage_reader=SafeReader(checkpoint), planner=SafeLoadPlanner(), no_dist=True)
    loader.load_state_dict(state["dataloader"])


@contextmanager
def _alone() -> Iterator[None]:
    """Keep torch from saying that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
