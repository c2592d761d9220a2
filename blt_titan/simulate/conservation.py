"""No row is lost or repeated: what ranks handed out, against the same streams read by one that never stopped.

Row n of a run is row n div S of stream n mod S. A run's rows pass if all of these hold:

    order    its n-th row has the digest of that row of that stream, read from its beginning to its end
    once     no digest comes more often than there; every row's text holds the number of its record batch
    whole    for each stream, the ids of its rows are those of the record batches that its position says are behind it
    dealt    no record batch was read twice in an epoch, by whatever streams

`order` compares with the code of streams; `whole` and `dealt` count without it, from sizes of record batches and the
order alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from blt_titan.data.rows.mixture import MixtureOrder
from blt_titan.data.rows.streams import POSITION_FIELDS, RowStream
from blt_titan.simulate.data import Text, open_text
from blt_titan.simulate.ranks import Part, Report, digest, parts, serve_part

_SHOWN = 3


class Undisturbed(NamedTuple):
    """The rows of a run in which nothing happens."""

    digests: np.ndarray
    """Digests of the rows in the run's order, uint64 [rows]."""
    read: np.ndarray
    """Stream, pick, epoch and number of each record batch that was read, int64 [record batches, 4]."""


@dataclass(frozen=True)
class Streams:
    """Streams that are read, one after the other."""

    text: Text
    numbers: tuple[int, ...]
    rows: int
    """Rows of the whole run."""


def deal_streams(text: Text, rows: int, workers: int) -> list[Streams]:
    """Return what there is to do to read the streams of a run, each from its beginning, until it has so many rows."""
    return [Streams(text, tuple(part.tolist()), rows) for part in parts(min(text.streams, rows), workers)]


def gather_streams(rows: int, found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Undisturbed:
    """Put together what was read of all streams."""
    digests = np.zeros(rows, np.uint64)
    for numbers, values, _ in found:
        digests[numbers] = values
    return Undisturbed(digests, np.concatenate([read for *_, read in found]))


def run_part(task: Part | Streams, report: Report) -> Any:
    """Do a part of either kind: in a module of its own, since a process that begins imports it."""
    return serve_part(task, report) if isinstance(task, Part) else read_streams(task, report)


def read_streams(task: Streams, report: Report) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers and digests of the rows of some streams, and what was read of their record batches."""
    data = open_text(task.text)
    numbers: list[int] = []
    digests: list[int] = []
    read: list[tuple[int, int, int, int]] = []
    for stream in task.numbers:

        def read_pick(pick: int, stream: int = stream) -> Any:
            number = data.order.record_batch(stream, pick)
            read.append((stream, pick, data.order.epoch(stream, pick), number))
            return data.source.read(number)

        rows = RowStream(read_pick, data.source.shape)
        for number in range(stream, task.rows, task.text.streams):
            row = rows.next_row()
            assert row is not None
            numbers.append(number)
            digests.append(digest(row))
            report(data.source.shape.n_bytes)
    return np.array(numbers), np.array(digests, np.uint64), np.array(read, np.int64)


def faults(text: Text, digests: np.ndarray, n_ids: np.ndarray, positions: np.ndarray, whole: Undisturbed) -> list[str]:
    """Return a sentence for each way in which rows were lost, repeated or moved; empty if none was.

    Args:
        text: what was read.
        digests: of the rows that ranks handed out in the run's order, uint64 [rows].
        n_ids: of the same, int64 [rows].
        positions: of all streams after them, int64 [streams, fields].
        whole: the rows of a run that never stopped.
    """
    checks = (
        _order(digests, whole.digests, text.streams),
        _once(digests, whole.digests),
        _whole(text, n_ids, positions, whole.read),
    )
    return [sentence for sentence in (*checks, _dealt(text, whole.read)) if sentence]


def _order(digests: np.ndarray, expected: np.ndarray, streams: int) -> str | None:
    if len(digests) != len(expected):
        return f"order: {len(digests):,} rows were handed out, a run that never stops has {len(expected):,}"
    wrong = np.flatnonzero(digests != expected)
    if not len(wrong):
        return None
    lost, made_up = (len(np.setdiff1d(*pair)) for pair in ((expected, digests), (digests, expected)))
    return (
        f"order: {len(wrong):,} of {len(digests):,} rows are not those of a run that never stops, the first "
        f"{_named(wrong[0], streams)}; {lost:,} rows of that run are missing, {made_up:,} are none of its rows"
    )


def _once(digests: np.ndarray, expected: np.ndarray) -> str | None:
    values, counts = np.unique(digests, return_counts=True)
    own, own_counts = np.unique(expected, return_counts=True)
    place = np.minimum(np.searchsorted(own, values), len(own) - 1)
    # Text that comes again in another epoch may fill a row alike.
    extra = counts - np.where(own[place] == values, np.maximum(own_counts[place], 1), 1)
    if (extra <= 0).all():
        return None
    places = np.flatnonzero(digests == values[np.argmax(extra)])[:_SHOWN]
    return f"once: {extra[extra > 0].sum():,} rows are repeated, one of them as rows {', '.join(map(str, places))}"


def _whole(text: Text, n_ids: np.ndarray, positions: np.ndarray, read: np.ndarray) -> str | None:
    data = open_text(text)
    pick, taken, rows = (positions[:, POSITION_FIELDS.index(name)] for name in ("pick", "ids_taken", "rows"))
    behind = read[read[:, 1] < pick[read[:, 0]]]
    passed = taken.copy()
    np.add.at(passed, behind[:, 0], data.templates.ids(behind[:, 3]))
    stream_of_row = np.arange(len(n_ids)) % text.streams
    handed_out = np.bincount(stream_of_row, n_ids, text.streams).astype(np.int64)
    made = np.bincount(stream_of_row, minlength=text.streams)
    wrong = np.flatnonzero((passed != handed_out) | (rows != made))
    if not len(wrong):
        return None
    first = wrong[0]
    return (
        f"whole: {len(wrong):,} streams are not where their rows end, the first {first}: {handed_out[first]:,} ids in "
        f"{made[first]} rows, its position says {passed[first]:,} in {rows[first]}"
    )


def _dealt(text: Text, read: np.ndarray) -> str | None:
    keys = read[:, 2:]
    order = open_text(text).order
    if isinstance(order, MixtureOrder):  # the epochs of each data set are its own
        keys = np.concatenate([keys, np.searchsorted(np.cumsum(order.sizes), read[:, 3:], side="right")], axis=1)
    distinct, counts = np.unique(keys, axis=0, return_counts=True)
    if len(distinct) == len(keys):
        return None
    epoch, number = distinct[counts > 1][0][:2]
    return (
        f"dealt: {len(keys) - len(distinct):,} record batches were read twice in an epoch, the first is number "
        f"{number} in epoch {epoch}"
    )


def _named(row: int, streams: int) -> str:
    return f"row {row:,} (stream {row % streams}, its row {row // streams})"
