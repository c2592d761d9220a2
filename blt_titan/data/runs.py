r"""Sorted runs: how any amount of text is put into a random order in bounded memory.

Documents have a 64-bit key, and the order that is wanted is that of the keys. In the first pass a worker holds
documents until its memory is full, sorts them, and writes them as one *spill*; the spills of a unit of work are its
run. The upper 12 bits of a key are its *bucket*, so that a bucket lies together in each spill. In the second pass some
buckets in a row are read from all spills and sorted once more.

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
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from blt_titan.data.errors import DataError

BUCKET_BITS = 12
BUCKETS = 1 << BUCKET_BITS
OVERHEAD_BYTES = 350
"""Of a document that is held, beside its text and id."""
_TABLES_AT_ONCE, _BUCKETS_AT_ONCE = 256, 256
_INDEX = np.dtype([("key", "<u8"), ("offset", "<u8"), ("text_bytes", "<u4"), ("id_bytes", "<u4"), ("crc32", "<u4")])


class RunWriter:
    """Write one run; nothing has its final name before `finish`.

    Args:
        path: without suffix.
        memory_bytes: what documents that are held may take.
    """

    def __init__(self, path: Path, *, memory_bytes: int):
        self._path, self._memory_bytes = path, memory_bytes
        self._text = open(_temporary(path, "text"), "wb")  # noqa: SIM115
        self._index = open(_temporary(path, "index"), "wb")  # noqa: SIM115
        self._table: list[np.ndarray] = []
        self._documents = self._offset = 0
        self._begin()

    def _begin(self) -> None:
        self._held_out: list[bool] = []
        self._keys: list[int] = []
        self._ids: list[bytes] = []
        self._texts: list[bytes] = []
        self._held_bytes = 0

    def add(self, held_out: bool, key: int, doc_id: bytes, text: bytes) -> None:
        """Append a document of train, or of validation if it is held out; key, 64 bits."""
        cost = len(text) + len(doc_id) + OVERHEAD_BYTES
        if self._held_bytes + cost > self._memory_bytes:
            self._spill()
        self._held_out.append(held_out)
        self._keys.append(key)
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
        if not self._keys:
            return
        keys = np.array(self._keys, np.uint64)
        buckets = np.array(self._held_out) * BUCKETS + (keys >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
        order = np.lexsort((keys, buckets))
        rows = np.empty(len(order), _INDEX)
        rows["key"] = keys[order]
        rows["text_bytes"] = np.fromiter(map(len, self._texts), np.int64, len(order))[order]
        rows["id_bytes"] = np.fromiter(map(len, self._ids), np.int64, len(order))[order]
        rows["crc32"] = np.fromiter(map(zlib.crc32, self._texts), np.uint32, len(order))[order]
        ends = np.cumsum(rows["text_bytes"].astype(np.int64) + rows["id_bytes"]) + self._offset
        rows["offset"][0], rows["offset"][1:] = self._offset, ends[:-1]
        self._text.writelines(chain.from_iterable((self._ids[i], self._texts[i]) for i in order.tolist()))
        self._index.write(rows.tobytes())
        begins = np.searchsorted(buckets[order], np.arange(2 * BUCKETS + 1))
        places = np.append(rows["offset"].astype(np.int64), ends[-1])
        self._table.append(np.stack([begins + self._documents, places[begins]]))
        self._documents += len(order)
        self._offset = int(ends[-1])
        self._begin()


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

    def read(self, first: int, end: int, choice: Choice, *, at_once: bool) -> Iterator[tuple[str, bytes]]:
        """Yield the documents of the buckets first..end-1 in the order of their keys, ties by id.

        Args:
            first: first bucket.
            end: after the last bucket.
            choice: which documents.
            at_once: hold all their text; else it is fetched document by document.

        Raises:
            DataError: two documents have the same id, or a file was damaged since it was written.
        """
        parts = [(path, rows[choice.mask(rows)]) for path, rows in self._parts(first, end)]
        parts = [(path, rows) for path, rows in parts if len(rows)]
        if not parts:
            return
        stretches = [_Stretch(path, rows, at_once) for path, rows in parts]
        rows = np.concatenate([rows for _, rows in parts])
        of_stretch = np.repeat(np.arange(len(parts)), [len(rows) for _, rows in parts])
        order = np.argsort(rows["key"], kind="stable")
        sorted_rows = zip(of_stretch[order].tolist(), rows[order].tolist(), strict=True)
        keys = rows["key"][order]
        if not (keys[1:] == keys[:-1]).any():
            for number, row in sorted_rows:
                doc_id, text = stretches[number].read(*row[1:])
                yield doc_id.decode(), text
            return
        for _, tied in groupby(sorted_rows, key=lambda number_and_row: number_and_row[1][0]):
            found = sorted(stretches[number].read(*row[1:]) for number, row in tied)
            for before, after in pairwise(found):
                if before[0] == after[0]:
                    doc_id = after[0].decode()
                    raise DataError(f"{doc_id}: a second document with the id {doc_id!r}; rename a file")
            for doc_id, text in found:
                yield doc_id.decode(), text

    def _parts(self, first: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yield, for each spill that has some of it, the file of its texts and its index rows."""
        begins, ends = self._table[0, first], self._table[0, end]
        for spill in np.flatnonzero(begins < ends).tolist():
            path, offset = self._paths[self._run_of_spill[spill]], int(begins[spill]) * _INDEX.itemsize
            yield f"{path}.text", np.fromfile(f"{path}.index", _INDEX, int(ends[spill] - begins[spill]), offset=offset)


class _Stretch:
    """The documents of one spill, from the first that is wanted to the last."""

    def __init__(self, path: str, rows: np.ndarray, at_once: bool):
        self._path = path
        self._begin = int(rows[0]["offset"])
        self._held: memoryview | None = None
        if at_once:
            end = int(rows[-1]["offset"]) + int(rows[-1]["text_bytes"]) + int(rows[-1]["id_bytes"])
            self._held = memoryview(self._from_file(self._begin, end - self._begin))

    def read(self, offset: int, text_bytes: int, id_bytes: int, crc32: int) -> tuple[bytes, bytes]:
        """Return id and text."""
        size = id_bytes + text_bytes
        if self._held is None:
            both = memoryview(self._from_file(offset, size))
        else:
            both = self._held[offset - self._begin :][:size]
        doc_id, text = bytes(both[:id_bytes]), bytes(both[id_bytes:])
        if len(both) != size or zlib.crc32(text) != crc32:
            raise DataError(f"{self._path}: damaged since it was written; remove its folder and start again")
        return doc_id, text

    def _from_file(self, offset: int, size: int) -> bytes:
        # Not kept open: there may be more runs than a process may have open files.
        with open(self._path, "rb") as file:
            file.seek(offset)
            return file.read(size)


def _table(path: Path) -> np.ndarray:
    return np.load(f"{path}.table.npy", mmap_mode="r", allow_pickle=False)


def _runs_of_spills(joined: Path) -> Path:
    return joined.with_name(f"{joined.name}.runs.npy")


def stretches(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Cut a sequence into stretches, each as long as its sizes sum to `limit` at most, or of one element.

    >>> list(stretches([3, 3, 9, 1, 1], 6))
    [(0, 2), (2, 3), (3, 5)]
    """
    begin = held = 0
    for number, size in enumerate(sizes):
        if number > begin and held + size > limit:
            yield begin, number
            begin, held = number, 0
        held += size
    if begin < len(sizes):
        yield begin, len(sizes)


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}.tmp")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
