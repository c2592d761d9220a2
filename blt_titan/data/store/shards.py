"""Shards of bytes: Arrow IPC files that are checked before they are believed.

In: documents `(doc_id, text)`. Out: `train-00000.arrow` (columns `doc_id`, `text`; any Arrow reader opens it)
and beside it `train-00000.index.npy`, int64 [record batches, 5]: file offset, message length, rows, text
bytes, crc32 of the raw message.

    file   ARROW1.. | schema | record batch 0 | record batch 1 | footer | ARROW1
    index                      448, 272, 2 rows, 6 bytes, crc
                                              720, 272, 2 rows, 11 bytes, crc

The decision that is not obvious: the reader never uses Arrow's footer or the file's own schema. It finds a
record batch by the index, checks the crc of its raw bytes, and then every number in them (`arrow_file.py`):
a crc tells damage from what was written, not whether what was written is sound.

Files here are memory-mapped: a file that another process truncates while it is read ends this one with SIGBUS.
Replace, never truncate. `object_store.py` says how files of object stores come here; they are checked alike.
"""

import contextlib
import hashlib
import io
import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blt_titan.data.store.address import Address, Place
from blt_titan.data.store.arrow_file import check_utf8, checked_offsets, parse_index, record_batch_buffers
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.folder import Content, Fetching, MappedFile, RemoteFolder, folder_of
from blt_titan.data.store.manifest import FORMAT, MANIFEST_NAME, VERSION, Manifest, ShardEntry, read_manifest
from blt_titan.data.store.record_batch import RecordBatch, RecordBatchInfo
from blt_titan.progress import ProgressBar

SCHEMA = pa.schema([("doc_id", pa.string()), ("text", pa.binary())])
INDEX_COLUMNS = ("offset", "length", "rows", "text_bytes", "crc32")
RECORD_BATCH_BYTES = 256 * 1024
SHARD_BYTES = 1024**3
TEMPORARY_SUFFIX = ".tmp"
MAX_RECORD_BATCH_BYTES = 2**31 - 1  # Arrow's `binary` has 32-bit offsets
_MAGIC = b"ARROW1"
_INDEXES_AT_ONCE = 16


class ShardWriter:
    """Write the shards of one split, all under temporary names until `install`.

    A record batch holds whole documents, about `record_batch_bytes` of text; a longer document is a record
    batch of its own. A shard is closed before it would exceed `shard_bytes`, unless one record batch alone
    does.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str, *, record_batch_bytes: int, shard_bytes: int):
        self._directory = Path(directory)
        self._split = split
        self._record_batch_bytes = record_batch_bytes
        self._shard_bytes = shard_bytes
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._entries: list[ShardEntry] = []
        self._index: list[tuple[int, ...]] = []
        self._file: io.BufferedWriter | None = None
        self._arrow: Any = None

    def add(self, doc_ids: pa.StringArray, texts: pa.BinaryArray) -> None:
        """Append documents."""
        ends = np.cumsum(pc.call_function("binary_length", [texts]).to_numpy(), dtype=np.int64)
        documents = pa.record_batch([doc_ids, texts], schema=SCHEMA)
        begin = before = 0
        while begin < len(ends):
            room = self._record_batch_bytes - self._pending_bytes
            end = max(begin + (not self._pending), int(np.searchsorted(ends, before + room, side="right")))
            if end > begin:
                self._pending.append(documents.slice(begin, end - begin))
                self._pending_bytes += int(ends[end - 1]) - before
                begin, before = end, int(ends[end - 1])
            if begin < len(ends):
                self._flush()

    def finish(self) -> tuple[ShardEntry, ...]:
        """Write what is pending and give the shards; their files still have temporary names."""
        if self._pending:
            self._flush()
        self._close_shard()
        return tuple(self._entries)

    def abandon(self) -> None:
        """Close the file of an unfinished shard, without writing any more of it."""
        if self._file is not None:
            self._file.raw.close()

    def _flush(self) -> None:
        # A copy even of one: what is serialized of a slice depends on what lies behind it.
        batch = pa.concat_batches(self._pending)
        message = batch.serialize()
        if self._file is not None and self._file.tell() + message.size > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._file = open(self._directory / (self._shard_name() + TEMPORARY_SUFFIX), "wb")  # noqa: SIM115
            self._arrow = pa.ipc.new_file(self._file, SCHEMA)
        self._arrow.write_batch(batch)
        # The crc is taken from memory, not read back, so that it also covers the way to the disk.
        offset = self._file.tell() - message.size
        self._index.append((offset, message.size, batch.num_rows, self._pending_bytes, zlib.crc32(message)))
        self._pending, self._pending_bytes = [], 0

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._arrow.close()
        file_bytes = self._file.tell()
        _sync_and_close(self._file)
        index = np.array(self._index, dtype=np.int64)
        index_bytes = io.BytesIO()
        np.save(index_bytes, index, allow_pickle=False)
        name = self._shard_name()
        index_name = name.removesuffix(".arrow") + ".index.npy"
        index_file = open(self._directory / (index_name + TEMPORARY_SUFFIX), "wb")  # noqa: SIM115
        index_file.write(index_bytes.getbuffer())
        _sync_and_close(index_file)
        digest = hashlib.sha256(index_bytes.getbuffer()).hexdigest()
        rows, text_bytes = int(index[:, 2].sum()), int(index[:, 3].sum())
        self._entries.append(ShardEntry(name, index_name, digest, file_bytes, len(index), rows, text_bytes))
        self._file, self._arrow, self._index = None, None, []

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self._entries):05d}.arrow"


def install(directory: str | os.PathLike[str], entries: tuple[ShardEntry, ...]) -> None:
    """Give finished shards and their indexes their final names."""
    for entry in entries:
        for name in (entry.file, entry.index_file):
            os.replace(Path(directory) / (name + TEMPORARY_SUFFIX), Path(directory) / name)


def _sync_and_close(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class _OpenShard(NamedTuple):
    path: Place
    content: Content
    index: np.ndarray  # int64 [record batches, 5]


class ShardSet:
    """Read the record batches of one split, by number.

    Construction looks only at the manifest and at each file's existence and size. A shard's Arrow magic and
    its index's digest are checked when it is first opened, a record batch's crc at every read. It pickles (a
    worker process opens its own files), and threads may read at once. Of an object store the sizes are those of one
    listing, and the magic is not asked for.

    Args:
        manifest_dir: the directory, or the address, that holds `manifest.json`.
        split: "train" or "validation".
        max_open_shards: how many shards stay memory-mapped, the least recently used going first.
        only: the file name of one shard, to open it alone.
        manifest: of the directory, if it was read before.
        fetching: how an object store is read.

    Raises:
        DataError: no or unknown manifest, unknown or empty split, a file missing or not of its recorded size.
    """

    def __init__(
        self,
        manifest_dir: str | os.PathLike[str] | Address,
        split: str,
        *,
        max_open_shards: int = 64,
        only: str | None = None,
        manifest: Manifest | None = None,
        fetching: Fetching | None = None,
    ):
        assert max_open_shards >= 1
        self.folder = folder_of(manifest_dir, fetching)
        self._max_open_shards = max_open_shards
        manifest_path = self.folder.place / MANIFEST_NAME
        splits = (manifest or read_manifest(self.folder)).splits
        if split not in splits:
            raise DataError(f"{manifest_path}: no split {split!r}; it may be one of {', '.join(splits)}")
        self._shards = tuple(shard for shard in splits[split] if only in (None, shard.file))
        if not self._shards:
            raise DataError(
                f"{manifest_path}: split {split!r} holds no documents; prepare the data with more text, "
                "or with another --validation-fraction"
            )
        self.split = split
        self.documents = sum(shard.documents for shard in self._shards)
        self.text_bytes = sum(shard.text_bytes for shard in self._shards)
        self._first_batch = [0, *accumulate(shard.record_batches for shard in self._shards)]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        for shard in self._shards:
            self._check_files(shard)

    def __len__(self) -> int:
        return self._first_batch[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        """The split's shards, as the manifest names them."""
        return self._shards

    @property
    def is_remote(self) -> bool:
        """Tell whether record batches are fetched from an object store."""
        return isinstance(self.folder, RemoteFolder)

    @property
    def index_bytes(self) -> int:
        """Bytes of all index files."""
        return sum(128 + 8 * len(INDEX_COLUMNS) * shard.record_batches for shard in self._shards)

    @property
    def fingerprint(self) -> str:
        """Identify the data, for checkpoints: a hex digest over the format version and all index digests."""
        parts = [FORMAT, str(VERSION), *(shard.index_sha256 for shard in self._shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def record_batch_info(self, i: int) -> RecordBatchInfo:
        """Say where record batch i of 0..R-1 lies and what it holds, without reading it."""
        return self._find(i)[0]

    def place_of(self, i: int) -> str:
        """Name record batch i by its file, which is not opened for it."""
        number = bisect_right(self._first_batch, i) - 1
        return f"{self.folder.place / self._shards[number].file}: record batch {i - self._first_batch[number]}"

    def read(self, i: int) -> RecordBatch:
        """Check and read record batch i of 0..R-1.

        Raises:
            DataError: its bytes do not match their checksum, or are not sound, or its shard is damaged; names file and
                record batch.
        """
        info, message = self._checked_message(i)
        try:
            rows, [id_offsets, id_bytes, offsets, text] = record_batch_buffers(message, (3, 3))
            id_offsets, offsets = checked_offsets(rows, id_offsets, id_bytes), checked_offsets(rows, offsets, text)
            check_utf8(id_offsets, id_bytes)
        except ValueError as error:
            raise DataError(
                f"{_where(info)}: not a record batch of byte documents ({error}); restore it, or prepare the data again"
            ) from error
        if (rows, offsets[-1]) != (info.rows, info.text_bytes):
            raise DataError(
                f"{_where(info)}: holds {rows} documents of {offsets[-1]} bytes, its index says {info.rows} of "
                f"{info.text_bytes}; prepare the data again"
            )
        text = text[: info.text_bytes]
        return RecordBatch(info.shard_path, info.batch_in_shard, text, offsets, info.crc32, id_bytes, id_offsets)

    def __iter__(self) -> Iterator[RecordBatch]:
        return map(self.read, range(len(self)))

    def verify_structure(self) -> None:
        """Check every shard's size, Arrow magic and index digest now; reads no text.

        Raises:
            DataError: names the first file that is damaged.
        """
        if self.is_remote:
            with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
                list(pool.map(self._load_shard, range(len(self._shards))))
            return
        for number in range(len(self._shards)):
            self._load_shard(number)

    def verify_checksums(self, *, progress: bool = False) -> None:
        """Check every record batch now as `read` does; reads every byte.

        Raises:
            DataError: names the first file and record batch that is damaged.
        """
        self.verify_structure()
        with ProgressBar(
            total=self.text_bytes, unit="B", unit_scale=True, desc="checking", disable=not progress
        ) as bar:
            for batch in self:
                bar.update(len(batch.text))

    def _checked_message(self, i: int) -> tuple[RecordBatchInfo, Any]:
        info, content = self._find(i)
        message = content.message(info.offset, info.length, info.crc32)
        crc = zlib.crc32(message)
        if crc != info.crc32:
            raise DataError(
                f"{_where(info)}: the bytes have crc32 {crc:08x}, the index says {info.crc32:08x}: "
                "the file is damaged; restore it, or prepare the data again"
            )
        return info, message

    def _find(self, i: int) -> tuple[RecordBatchInfo, Content]:
        """Give the place of record batch i, and the content of its shard."""
        if not 0 <= i < len(self):
            raise IndexError(f"record batch {i} is outside 0..{len(self) - 1} of split {self.split!r}")
        number = bisect_right(self._first_batch, i) - 1
        shard, batch_in_shard = self._open_shard(number), i - self._first_batch[number]
        return RecordBatchInfo(shard.path, batch_in_shard, *shard.index[batch_in_shard].tolist()), shard.content

    def _open_shard(self, number: int) -> _OpenShard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._load_shard(number)
            if len(self._open) > self._max_open_shards:
                self._open.popitem(last=False)
        else:
            # Another thread may have closed it meanwhile.
            with contextlib.suppress(KeyError):
                self._open.move_to_end(number)
        return shard

    def _load_shard(self, number: int) -> _OpenShard:
        entry = self._shards[number]
        self._check_files(entry)
        path, index_path = self.folder.place / entry.file, self.folder.place / entry.index_file
        try:
            content = self.folder.open(entry.file)
            index_bytes = self.folder.read_index(entry.index_file, entry.index_sha256)
        except OSError as error:
            raise DataError(f"{path}: it or its index cannot be read ({error}); check permissions") from error
        if isinstance(content, MappedFile) and not content.is_between(_MAGIC):
            raise DataError(f"{path}: not an Arrow IPC file; restore it, or prepare the data again")
        if hashlib.sha256(index_bytes).hexdigest() != entry.index_sha256:
            raise DataError(
                f"{index_path}: does not match its digest in {MANIFEST_NAME}; restore it, or prepare the data again"
            )
        shape = (entry.record_batches, len(INDEX_COLUMNS))
        try:
            index = parse_index(index_bytes, shape, content.size)
            totals = tuple(sum(column) for column in index[:, 2:4].T.tolist())
            if totals != (entry.documents, entry.text_bytes):
                raise ValueError(f"{totals[0]} documents, {totals[1]} bytes of text")
        except ValueError as error:
            raise DataError(
                f"{index_path}: does not fit its shard as {MANIFEST_NAME} describes it (int64 {shape}, "
                f"{entry.documents} documents, {entry.text_bytes} bytes of text): {error}; prepare the data again"
            ) from error
        return _OpenShard(path, content, index)

    def _check_files(self, entry: ShardEntry) -> None:
        path = self.folder.place / entry.file
        try:
            self.folder.size(entry.index_file)
            found = self.folder.size(entry.file)
        except OSError as error:
            raise DataError(
                f"{error.filename}: {error.strerror}, but {MANIFEST_NAME} names it; "
                "restore it, or prepare the data again"
            ) from error
        if found != entry.file_bytes:
            raise DataError(
                f"{path}: {found} bytes, {MANIFEST_NAME} says {entry.file_bytes}; restore it, or prepare the data again"
            )


def _where(info: RecordBatchInfo) -> str:
    return f"{info.shard_path}: record batch {info.batch_in_shard}"
