"""What a worker of `prepare` does: read a unit of sources into a sorted run, or write a piece of the order as shards.

Tasks are small and pickle; what they make lies in the working directory, and the last file of each, `.done.json`, says
that the rest is there.

    units/00012.text .index .table.npy .done.json
    pieces/train-00003/train-00000.arrow ...    pieces/train-00003.done.json
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blt_titan.data.prepare.extents import Document, Extent, PassedOver, Problem
from blt_titan.data.prepare.file_systems import cannot_read
from blt_titan.data.prepare.formats import read_extent
from blt_titan.data.prepare.runs import OVERHEAD_BYTES, Choice, Runs, RunWriter, join_runs, stretches
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardWriter, install

logger = logging.getLogger(__name__)

_PROCESS_BYTES = 128 * 1024**2
"""Memory of a worker that holds no text: the interpreter and its libraries."""
_RECORD_COPIES = 10
"""What a line of JSON takes at most, of its own size: as characters of four bytes, twice, and as bytes, twice."""
_AT_ONCE_BYTES, _READ_BYTES = 64 * 1024**2, 64 * 1024
"""What a piece holds: no more than reads of a decent size need, as fresh memory costs more than reading does."""
_MESSAGES_OF_UNIT = 20


@dataclass(frozen=True)
class ReadUnit:
    """Extents to read, and where to."""

    number: int
    folder: str
    extents: tuple[Extent, ...]
    seed: int
    validation_fraction: float
    text_column: str
    on_error: str
    max_record_bytes: int
    worker_bytes: int
    as_text: bool = False

    @property
    def size_bytes(self) -> int:
        """Size of all extents, as they are stored."""
        return sum(extent.size_bytes for extent in self.extents)


@dataclass
class Done:
    """What a finished unit found."""

    documents: int = 0
    empty: int = 0
    binary: int = 0
    skipped: int = 0
    smallest: int = 0
    """Bytes of its smallest document."""
    smallest_id: str = ""
    by_source: dict[int, list[int]] = field(default_factory=dict)
    """Documents, bytes, empty ones, binary files and skipped records of each source."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """How many links and files of each kind."""
    messages: list[str] = field(default_factory=list)
    """Why the first skipped records were skipped."""
    passed_over_messages: list[str] = field(default_factory=list)
    """Why the first links and files were passed over."""

    def name_skipped(self, message: str) -> None:
        """Keep and log the first messages of skipped records."""
        self._name("skipped", message, self.messages)

    def name_passed_over(self, message: str) -> None:
        """Keep and log the first messages of what was passed over; many links must not hide a record."""
        self._name("passed over", message, self.passed_over_messages)

    @staticmethod
    def _name(what: str, message: str, kept: list[str]) -> None:
        if len(kept) < _MESSAGES_OF_UNIT:
            logger.warning(f"{what}: {message}")
            kept.append(message)

    @classmethod
    def read(cls, path: Path) -> "Done | None":
        """Return what a unit said when it was done; None if it is not."""
        try:
            content = json.loads(done_path(path).read_bytes())
        except FileNotFoundError:
            return None
        return cls(**content | {"by_source": {int(k): v for k, v in content["by_source"].items()}})


@dataclass(frozen=True)
class Piece:
    """Buckets in a row that become shards of one split."""

    split: str
    number: int
    first: int
    end: int
    choice: Choice


@dataclass(frozen=True)
class WritePiece:
    """A piece to write, and how."""

    folder: str
    piece: Piece
    units: int
    record_batch_bytes: int
    shard_bytes: int
    worker_bytes: int


def unit_path(folder: str | Path, number: int) -> Path:
    """Return the path of a unit's run, without suffix."""
    return Path(folder) / "units" / f"{number:05d}"


def piece_path(folder: str | Path, piece: Piece) -> Path:
    """Return the directory of a piece's shards."""
    return (
        Path(folder) / "pieces" / f"{piece.split}-{piece.number:05d}{'-moved' if piece.choice.only is not None else ''}"
    )


def least_worker_bytes(max_record_bytes: int) -> int:
    """Return what a worker takes that holds nothing but a record."""
    return _PROCESS_BYTES + _RECORD_COPIES * max_record_bytes


def done_path(path: Path) -> Path:
    """Return the file that says that a unit or a piece is done."""
    return path.with_name(f"{path.name}.done.json")


def runs_of(folder: str | Path, units: int) -> Runs:
    """Return the runs of all units; what joins them is made when it is missing."""
    paths, joined = [unit_path(folder, number) for number in range(units)], Path(folder) / "table.npy"
    if not joined.exists():
        join_runs(paths, joined)
    return Runs(paths, joined)


def keyed_hashes(seed: int) -> Callable[[bytes], bytes]:
    """Return what gives an id twice 64 bits that depend on it and the seed alone: for the order, and for the split."""
    key = seed.to_bytes(8, "little")
    return lambda doc_id: hashlib.blake2b(doc_id, digest_size=16, key=key).digest()


def read_unit(unit: ReadUnit, report: Callable[[int], None]) -> Done:
    """Read the extents of a unit into its run.

    Raises:
        DataError: a file cannot be read, or with on_error "stop" a record cannot be used.
    """
    path = unit_path(unit.folder, unit.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = Done()
    hashes = keyed_hashes(unit.seed)
    run = RunWriter(
        path,
        memory_bytes=unit.worker_bytes - least_worker_bytes(unit.max_record_bytes),
        held_out_below=int(unit.validation_fraction * 2**64),
    )
    try:
        for extent in unit.extents:
            counted = done.by_source.setdefault(extent.source, [0, 0, 0, 0, 0])
            for item in read_extent(
                extent,
                text_column=unit.text_column,
                max_record_bytes=unit.max_record_bytes,
                as_text=unit.as_text,
                report=report,
            ):
                if isinstance(item, Document):
                    text = item.text
                    if not text:
                        done.empty += 1
                        counted[2] += 1
                        continue
                    doc_id = item.doc_id.encode()
                    run.add(hashes(doc_id), doc_id, text)
                    if not done.documents or len(text) < done.smallest:
                        done.smallest, done.smallest_id = len(text), item.doc_id
                    done.documents += 1
                    counted[0] += 1
                    counted[1] += len(text)
                elif isinstance(item, Problem):
                    if unit.on_error == "stop":
                        raise DataError(f"{item.message} (or pass over such records with --on-error skip)")
                    done.name_skipped(item.message)
                    done.skipped += 1
                    counted[4] += 1
                elif isinstance(item, PassedOver):
                    done.name_passed_over(item.message)
                    done.passed_over[item.kind] = done.passed_over.get(item.kind, 0) + 1
                else:
                    done.binary += 1
                    counted[3] += 1
        run.finish()
    except BaseException:
        run.abandon()
        raise
    _say_done(path, asdict(done))
    return done


def write_piece(task: WritePiece, report: Callable[[int], None]) -> None:
    """Write the shards of a piece."""
    folder = piece_path(task.folder, task.piece)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    runs = runs_of(task.folder, task.units)
    writer = ShardWriter(
        folder, task.piece.split, record_batch_bytes=task.record_batch_bytes, shard_bytes=task.shard_bytes
    )
    piece = task.piece
    memory_bytes = min((task.worker_bytes - _PROCESS_BYTES) // 2, max(_AT_ONCE_BYTES, _READ_BYTES * task.units))
    documents, text_bytes = runs.sizes(piece.first, piece.end)
    sizes = text_bytes + OVERHEAD_BYTES * documents
    try:
        for begin, end in stretches(sizes, memory_bytes):
            buckets = (piece.first + begin, piece.first + end)
            for documents in runs.read(*buckets, piece.choice, memory_bytes=memory_bytes):
                writer.add(documents.ids, documents.texts)
                report(sum(column.nbytes - 4 * len(column) for column in documents))
        entries = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    install(folder, entries)
    _say_done(folder, [asdict(entry) for entry in entries])


def _say_done(path: Path, content: Any) -> None:
    write_atomically(done_path(path), json.dumps(content).encode())


def count_newlines(extent: Extent, report: Callable[[int], None]) -> int:
    """Count the newlines in an extent of lines."""
    newlines, left = 0, extent.end - extent.begin
    try:
        with open(extent.path, "rb", buffering=0) as file:
            file.seek(extent.begin)
            while left and (piece := file.read(min(left, 1 << 20))):
                newlines += piece.count(b"\n")
                left -= len(piece)
                report(len(piece))
    except OSError as error:
        raise cannot_read(extent.path, error) from error
    return newlines
