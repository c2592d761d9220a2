r"""Sorted runs: how any amount of text is put into a random order in bounded memory.

Documents have a 64-bit key, and the order that is wanted is that of the keys. In the first pass a worker holds
documents until its memory is full, sorts them, and writes them as one *spill*; the spills of a unit of work are its
run. The upper 12 bits of a key are its *bucket*, so that a bucket lies together in each spill. In the second pass some
buckets in a row are read from all spills and sorted once more; what does not fit into memory, in stretches of keys,
which lie together as well.

    keys (bucket in front)      spill 0   0.3 0.8 | 1.5 | 2.2        spill 1   0.1 | 1.9 | 2.4 2.7
    read bucket 0               0.3 0.8 and 0.1  ->  0.1 0.3 0.8

Train and validation are kept apart from the beginning: bucket b of validation is BUCKETS + b.

Three files make a run: `.text`, ids and texts one after the other; `.index`, 28 bytes a document; `.table.npy`, int64
[spills, 2, 2 * BUCKETS + 1], where each bucket begins in the index and in the text. Before the second pass the tables
of all runs are turned into one, int64 [2, 2 * BUCKETS + 1, spills], so that some buckets are one stretch of it.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from blt_titan.data.store.errors import DataError

BUCKET_BITS = 12
BUCKETS = 1 << BUCKET_BITS
OVERHEAD_BYTES = 350
"""Memory of a document that is held, beside its text and id."""
_TABLES_AT_ONCE, _BUCKETS_AT_ONCE = 256, 256
_JOINED_DOCUMENTS = 64
_YIELDED_BYTES = 2 * 1024**2
_INDEX = np.dtype([("key", "<u8"), ("offset", "<u8"), ("text_bytes", "<u4"), ("id_bytes", "<u4"), ("crc32", "<u4")])


class RunWriter:
    """Write one run; nothing has its final name before `finish`.

    Args:
        path: without suffix.
        memory_bytes: what documents that are held may take.
        held_out_below: a document whose second hash is below it goes to validation.
    """

    def __init__(self, path: Path, *, memory_bytes: int, held_out_below: int):
        self._path, self._memory_bytes, self._held_out_below = path, memory_bytes, held_out_below
        self._text = open(_temporary(path, "text"), "wb")  # noqa: SIM115
        self._index = open(_temporary(path, "index"), "wb")  # noqa: SIM115
        self._table: list[np.ndarray] = []
        self._documents = self._offset = 0
        self._begin()

    def _begin(self) -> None:
        self._hashes: list[bytes] = []
        self._ids: list[bytes] = []
        self._texts: list[bytes] = []
        self._held_bytes = 0

    def add(self, hashes: bytes, doc_id: bytes, text: bytes) -> None:
        """Append a document; hashes, twice 64 bits: its key, and what decides between train and validation."""
        cost = len(text) + len(doc_id) + OVERHEAD_BYTES
        if self._held_bytes + cost > self._memory_bytes:
            self._spill()
        self._hashes.append(hashes)
        self._ids.append(doc_id)
        self._texts.append(text)
        self._held_bytes += cost

    def finish(self) -> None:
        """Write what is held, and give the files their names."""
        self._spill()
        with open(_temporary(self._path, "table.npy"), "wb") as file:
            np.save(file, np.array(self._table, np.int64).reshape(-1, 2, 2 * BUCKETS + 1), allow_pickle=False)
            _sync(file)
        for file in (self._text, self._index):
            _sync(file)
            file.close()
        for suffix in ("text", "index", "table.npy"):
            os.replace(_temporary(self._path, suffix), f"{self._path}.{suffix}")

    def abandon(self) -> None:
        """Remove what was written."""
        for file in (self._text, self._index):
            file.raw.close()  # without what is still buffered: the disk may be full
        for suffix in ("text", "index", "table.npy"):
            _temporary(self._path, suffix).unlink(missing_ok=True)

    def _spill(self) -> None:
        if not self._hashes:
            return
        keys, ranks = np.frombuffer(b"".join(self._hashes), "<u8").reshape(-1, 2).T
        held_out = ranks < np.uint64(self._held_out_below)
        buckets = held_out * BUCKETS + (keys >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
        order = np.lexsort((keys, buckets))
        rows = np.empty(len(order), _INDEX)
        rows["key"] = keys[order]
        rows["text_bytes"] = np.fromiter(map(len, self._texts), np.int64, len(order))[order]
        rows["id_bytes"] = np.fromiter(map(len, self._ids), np.int64, len(order))[order]
        of_ids = map(zlib.crc32, self._ids)
        rows["crc32"] = np.fromiter(map(zlib.crc32, self._texts, of_ids), np.uint32, len(order))[order]
        ends = np.cumsum(rows["text_bytes"].astype(np.int64) + rows["id_bytes"]) + self._offset
        rows["offset"][0], rows["offset"][1:] = self._offset, ends[:-1]
        for begin in range(0, len(order), _JOINED_DOCUMENTS):
            places = order[begin : begin + _JOINED_DOCUMENTS].tolist()
            self._text.write(b"".join(chain.from_iterable([(self._ids[i], self._texts[i]) for i in places])))
        self._index.write(rows.tobytes())
        begins = np.searchsorted(buckets[order], np.arange(2 * BUCKETS + 1))
        offsets = np.append(rows["offset"].astype(np.int64), ends[-1])
        self._table.append(np.stack([begins + self._documents, offsets[begins]]))
        self._documents += len(order)
        self._offset = int(ends[-1])
        self._begin()


class Documents(NamedTuple):
    """Some documents in their order, as Arrow keeps them."""

    ids: pa.StringArray
    texts: pa.BinaryArray


@dataclass(frozen=True)
class Choice:
    """Which documents of a bucket are taken; all, unless something is set."""

    last_key: int | None = None
    """None after this key, but for `later`."""
    later: tuple[int, ...] = ()
    """Keys of documents that are taken all the same."""
    most_bytes: int | None = None
    """None longer than this."""
    only: int | None = None
    """The document of this key alone."""
    without: int | None = None
    """Not the document of this key."""

    def mask(self, rows: np.ndarray) -> np.ndarray:
        """Return which index rows [N] are taken, bool [N]."""
        taken = np.ones(len(rows), bool)
        if self.last_key is not None:
            later = np.array(self.later, np.uint64)
            taken &= (rows["key"] <= np.uint64(self.last_key)) | np.isin(rows["key"], later)
        if self.most_bytes is not None:
            taken &= rows["text_bytes"] <= self.most_bytes
        if self.only is not None:
            taken &= rows["key"] == np.uint64(self.only)
        if self.without is not None:
            taken &= rows["key"] != np.uint64(self.without)
        return taken


def join_runs(paths: Sequence[Path], joined: Path) -> None:
    """Write the table of all runs, `joined`, and beside it the number of each spill's run."""
    tables = [_table(path) for path in paths]
    run_of_spill = np.repeat(np.arange(len(paths)), [len(table) for table in tables])
    temporary = joined.with_name(f"{joined.name}.tmp")
    shape = (2, 2 * BUCKETS + 1, len(run_of_spill))
    whole = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=shape)
    done = 0
    for begin in range(0, len(tables), _TABLES_AT_ONCE):
        several = np.concatenate(tables[begin : begin + _TABLES_AT_ONCE])
        whole[:, :, done : done + len(several)] = several.transpose(1, 2, 0)
        done += len(several)
    whole.flush()
    np.save(_runs_of_spills(joined), run_of_spill)
    os.replace(temporary, joined)


class Runs:
    """Read finished runs, some buckets at a time.

    Args:
        paths: of the runs, without suffix.
        joined: what `join_runs` made of them.
    """

    def __init__(self, paths: Sequence[Path], joined: Path):
        self._paths = paths
        self._table = np.load(joined, mmap_mode="r", allow_pickle=False)
        self._run_of_spill = np.load(_runs_of_spills(joined))

    def sizes(self, first: int = 0, end: int = 2 * BUCKETS) -> np.ndarray:
        """Return what each bucket holds: documents, and bytes of ids and texts; int64 [2, end - first]."""
        parts = []
        for begin in range(first, end, _BUCKETS_AT_ONCE):
            stop = min(begin + _BUCKETS_AT_ONCE, end)
            parts.append(np.diff(self._table[:, begin : stop + 1], axis=1).sum(axis=2))
        return np.concatenate(parts, axis=1)

    def rows(self, first: int, end: int) -> np.ndarray:
        """Return the index of the buckets first..end-1, unsorted."""
        parts = [rows for _, rows in self._parts(first, end)]
        return np.concatenate(parts) if parts else np.empty(0, _INDEX)

    def read(self, first: int, end: int, choice: Choice, *, memory_bytes: int) -> Iterator[Documents]:
        """Yield the documents of the buckets first..end-1 in the order of their keys, ties by id.

        Args:
            first: first bucket.
            end: after the last bucket.
            choice: which documents.
            memory_bytes: what documents that are held may take; buckets that do not fit are read in parts.

        Raises:
            DataError: two documents have the same id, or a file was damaged since it was written.
        """
        spills = list(self._parts(first, end))
        if not spills:
            return
        rows = np.concatenate([of_spill for _, of_spill in spills])
        texts = _Texts([path for path, _ in spills], [len(of_spill) for _, of_spill in spills], rows)
        order = np.argsort(rows["key"], kind="stable")
        for begin, stop in _runs_of_equal(rows["key"][order]):
            order[begin:stop] = texts.by_id(order[begin:stop])
        taken = choice.mask(rows)
        sizes = rows["text_bytes"].astype(np.int64) + rows["id_bytes"] + OVERHEAD_BYTES
        for begin, stop in stretches(sizes[order], memory_bytes):
            wanted = order[begin:stop]
            yield from texts.read(wanted[taken[wanted]])

    def _parts(self, first: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yield, for each spill that has some of it, the file of its texts and its index rows."""
        begins, ends = self._table[0, first], self._table[0, end]
        for spill in np.flatnonzero(begins < ends).tolist():
            path, offset = self._paths[self._run_of_spill[spill]], int(begins[spill]) * _INDEX.itemsize
            yield f"{path}.text", np.fromfile(f"{path}.index", _INDEX, int(ends[spill] - begins[spill]), offset=offset)


class _Texts:
    """Documents of several spills, by their numbers in `rows`.

    Args:
        paths: of each spill's texts.
        counts: how many rows each spill has; they lie one after the other in its file.
        rows: index rows of all spills.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int], rows: np.ndarray):
        self._paths, self._rows = paths, rows
        self._spill = np.repeat(np.arange(len(paths)), counts)

    def read(self, wanted: np.ndarray) -> Iterator[Documents]:
        """Yield documents in the order of `wanted`, int64 [N]; all of them are held at once."""
        if not len(wanted):
            return
        # From each spill, what lies from its first wanted document to its last.
        first, end = np.full(len(self._paths), len(self._rows)), np.zeros(len(self._paths), np.int64)
        spill = self._spill[wanted]
        np.minimum.at(first, spill, wanted)
        np.maximum.at(end, spill, wanted + 1)
        wanted_spills = np.flatnonzero(first < end)
        held = self._rows[np.concatenate([np.arange(first[number], end[number]) for number in wanted_spills.tolist()])]
        offsets = np.zeros(2 * len(held) + 1, np.int64)
        np.cumsum(np.stack([held["id_bytes"], held["text_bytes"]], axis=1), out=offsets[1:], dtype=np.int64)
        content = np.empty(offsets[-1], np.uint8)
        before = np.zeros(len(self._paths), np.int64)
        before[wanted_spills[1:]] = np.cumsum(end[wanted_spills] - first[wanted_spills])[:-1]
        for number in wanted_spills.tolist():
            begin, stop = before[number], before[number] + end[number] - first[number]
            self._fill(content[offsets[2 * begin] : offsets[2 * stop]], number, int(held["offset"][begin]))
        place = wanted - first[spill] + before[spill]
        self._check(content.data, offsets, place, held["crc32"], spill)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
        both = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 2 * len(held), buffers)
        for begin, stop in stretches(held["text_bytes"][place], _YIELDED_BYTES):
            ids = both.take(pa.array(2 * place[begin:stop])).cast(pa.binary()).cast(pa.string())
            yield Documents(ids, both.take(pa.array(2 * place[begin:stop] + 1)).cast(pa.binary()))

    def by_id(self, tied: np.ndarray) -> list[int]:
        """Return some numbers in the order of the documents' ids."""
        ids = [doc_id for documents in self.read(tied) for doc_id in documents.ids.to_pylist()]
        for doc_id, after in pairwise(sorted(ids)):
            if doc_id == after:
                raise DataError(f"{doc_id}: a second document with the id {doc_id!r}; rename a file")
        return [number for _, number in sorted(zip(ids, tied.tolist(), strict=True))]

    def _fill(self, content: np.ndarray, spill: int, offset: int) -> None:
        # Not kept open: there may be more runs than a process may have open files.
        with open(self._paths[spill], "rb", buffering=0) as file:
            file.seek(offset)
            view = content.data
            while len(view):
                n_bytes = file.readinto(view)
                if not n_bytes:
                    raise self._damaged(spill)
                view = view[n_bytes:]

    def _check(
        self, content: memoryview, offsets: np.ndarray, place: np.ndarray, crc32: np.ndarray, spill: np.ndarray
    ) -> None:
        begins, ends = offsets[2 * place].tolist(), offsets[2 * place + 2].tolist()
        found = (zlib.crc32(content[begin:end]) for begin, end in zip(begins, ends, strict=True))
        wrong = np.fromiter(found, np.uint32, len(place)) != crc32[place]
        if wrong.any():
            raise self._damaged(int(spill[wrong.argmax()]))

    def _damaged(self, spill: int) -> DataError:
        return DataError(f"{self._paths[spill]}: damaged since it was written; remove its folder and start again")


def _runs_of_equal(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield where sorted keys are equal: stretches of two or more."""
    same = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
    edges = np.flatnonzero(same[1:] != same[:-1])
    yield from ((int(begin), int(last) + 1) for begin, last in edges.reshape(-1, 2))


def _table(path: Path) -> np.ndarray:
    return np.load(f"{path}.table.npy", mmap_mode="r", allow_pickle=False)


def _runs_of_spills(joined: Path) -> Path:
    return joined.with_name(f"{joined.name}.runs.npy")


def stretches(sizes: Sequence[int] | np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Cut a sequence into stretches, each as long as its sizes sum to `limit` at most, or of one element.

    >>> list(stretches([3, 3, 9, 1, 1], 6))
    [(0, 2), (2, 3), (3, 5)]
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    begin = before = 0
    while begin < len(ends):
        end = max(begin + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield begin, end
        begin, before = end, int(ends[end - 1])


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}.tmp")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
