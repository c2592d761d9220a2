"""What `prepare` takes of the documents that it found, and how their order is cut into pieces.

Nothing here reads text: the index rows of the runs, keys and sizes, decide. With a limit of 100 bytes, sizes in the
order of their keys:

    sizes     30   50   40   12    8    5
    taken     30   50    -   12    8    -       what does not fit is passed over
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from blt_titan.data.prepare.runs import BUCKET_BITS, BUCKETS, Choice, Runs, stretches
from blt_titan.data.prepare.work import Done, Piece
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import SPLITS

_INDEX_ROWS_AT_ONCE = 1_000_000
_ARROW_BYTES = 24
"""What a document takes in a shard beside its text and id, about."""


class Plan(NamedTuple):
    """The pieces, and what they hold together."""

    pieces: list[Piece]
    documents: int
    text_bytes: int
    """With ids."""
    over_max_bytes: int
    """Documents that max_bytes leaves out."""


def plan_pieces(runs: Runs, done: Sequence[Done], settings: Mapping[str, Any]) -> Plan:
    """Choose the documents and cut their order into pieces.

    Args:
        runs: of all units.
        done: what the units found.
        settings: max_bytes, validation_fraction and shard_bytes of `prepare`.

    Raises:
        DataError: no document fits into max_bytes.
    """
    documents, sizes = runs.sizes()
    choice, total = Choice(), int(documents.sum())
    if (most := settings["max_bytes"]) is not None:
        choice = _choose(runs, documents, done, most)
        documents, sizes = _taken(runs, documents, choice)
    in_split = [int(documents[:BUCKETS].sum()), int(documents[BUCKETS:].sum())]
    moved: list[Piece] = []
    wants_validation = settings["validation_fraction"] > 0 and sum(in_split) > 1
    if not in_split[0] or (wants_validation and not in_split[1]):
        # The first document of train goes to validation, or the last of validation to train.
        empty = in_split.index(0)
        filled = np.flatnonzero(documents)
        bucket = int(filled[0] if empty == 1 else filled[-1])
        rows = runs.rows(bucket, bucket + 1)
        keys = rows[choice.mask(rows)]["key"]
        key = int(keys.min() if empty == 1 else keys.max())
        moved = [Piece(SPLITS[empty], 0, bucket, bucket + 1, replace(choice, only=key))]
        choice = replace(choice, without=key)
    planned = sizes + _ARROW_BYTES * documents
    pieces = moved
    for split in (split for split in range(2) if in_split[split]):
        of_split = planned[split * BUCKETS : (split + 1) * BUCKETS].tolist()
        for number, buckets in enumerate(stretches(of_split, settings["shard_bytes"])):
            first, end = (split * BUCKETS + bucket for bucket in buckets)
            of_piece = replace(choice, later=_keys_in(choice.later, first, end))
            pieces.append(Piece(SPLITS[split], number, first, end, of_piece))
    return Plan(pieces, sum(in_split), int(sizes.sum()), total - sum(in_split))


def _choose(runs: Runs, documents: np.ndarray, done: Sequence[Done], most_bytes: int) -> Choice:
    """Find the documents that fit into `most_bytes`: in the order of the keys, passing over those that do not."""
    smallest, doc_id = min((unit.smallest, unit.smallest_id) for unit in done if unit.documents)
    if smallest > most_bytes:
        raise DataError(
            f"{doc_id}: the smallest document has {smallest} bytes, more than max_bytes {most_bytes}; raise it"
        )
    left, last_key, passed_over = most_bytes, 0, False
    later: list[int] = []
    for begin, end in _stretches_of_buckets(documents):
        rows = np.concatenate([runs.rows(split * BUCKETS + begin, split * BUCKETS + end) for split in range(2)])
        rows = rows[rows["text_bytes"] <= (left if passed_over else most_bytes)]
        rows = rows[np.argsort(rows["key"])]
        fit = 0
        if not passed_over:
            ends = np.cumsum(rows["text_bytes"], dtype=np.int64)
            fit = int(np.searchsorted(ends, left, side="right"))
            if fit:
                last_key = int(rows["key"][fit - 1])
                left -= int(ends[fit - 1])
            passed_over = fit < len(rows)
        for key, text_bytes in rows[["key", "text_bytes"]][fit:].tolist():
            if text_bytes <= left:
                later.append(key)
                left -= text_bytes
        if left < smallest:
            break
    return Choice(last_key=last_key, later=tuple(later), most_bytes=most_bytes)


def _keys_in(keys: Sequence[int], first: int, end: int) -> tuple[int, ...]:
    """Return the keys of some buckets of one split."""
    shift, split = 64 - BUCKET_BITS, first // BUCKETS * BUCKETS
    return tuple(key for key in keys if first <= split + (key >> shift) < end)


def _stretches_of_buckets(documents: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield stretches of buckets, of both splits together, whose index rows fit into memory easily."""
    return stretches((documents[:BUCKETS] + documents[BUCKETS:]).tolist(), _INDEX_ROWS_AT_ONCE)


def _taken(runs: Runs, documents: np.ndarray, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """Count what is taken of each bucket: documents, and bytes of ids and texts."""
    taken, sizes = np.zeros_like(documents), np.zeros_like(documents)
    for begin, end in _stretches_of_buckets(documents):
        for split in range(2):
            rows = runs.rows(split * BUCKETS + begin, split * BUCKETS + end)
            rows = rows[choice.mask(rows)]
            buckets = split * BUCKETS + (rows["key"] >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
            np.add.at(taken, buckets, 1)
            np.add.at(sizes, buckets, rows["text_bytes"].astype(np.int64) + rows["id_bytes"])
    return taken, sizes
