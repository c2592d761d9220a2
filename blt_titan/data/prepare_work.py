"""What a worker of `prepare` does: read a unit of sources into a sorted run, or write a piece of the order as shards.

Tasks are small and pickle; what they make lies in the working directory, and the last file of each, `.done.json`, says
that the rest is there.

    units/00012.text .index .table.npy .done.json
    pieces/train-00003/train-00000.arrow.tmp ...    pieces/train-00003.done.json
"""

import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blt_titan.data.errors import DataError
from blt_titan.data.formats import Binary, Problem, read_extent
from blt_titan.data.runs import Choice, Runs, RunWriter
from blt_titan.data.shards import ShardWriter
from blt_titan.data.sources import Extent

logger = logging.getLogger(__name__)

_PROCESS_BYTES = 128 * 1024**2
"""Of a worker that holds no text: the interpreter and its libraries."""
_SPILL_SHARE = 4
"""Of a worker's memory for text, the run holds a quarter; the rest is for the record that is read."""
_STRETCH_SHARE = 2
"""When shards are written, text is held once and copied piece by piece."""
_MESSAGES_OF_UNIT = 20
_TWO_HASHES = struct.Struct("<QQ")


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
    worker_bytes: int


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
    messages: list[str] = field(default_factory=list)
    """Of the first skipped records."""

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


def done_path(path: Path) -> Path:
    """Return the file that says that a unit or a piece is done."""
    return path.with_name(f"{path.name}.done.json")


def runs_of(folder: str | Path, units: int) -> Runs:
    """Return the runs of all units."""
    return Runs([unit_path(folder, number) for number in range(units)])


def keyed_hashes(seed: int, doc_id: bytes) -> tuple[int, int]:
    """Give twice 64 bits that depend on the seed and the document's id alone: for the order, and for the split."""
    return _TWO_HASHES.unpack(hashlib.blake2b(doc_id, digest_size=16, key=seed.to_bytes(8, "little")).digest())


def read_unit(unit: ReadUnit, report: Callable[[int], None]) -> Done:
    """Read the extents of a unit into its run.

    Raises:
        DataError: a file cannot be read, or with on_error "stop" a record cannot be used.
    """
    path = unit_path(unit.folder, unit.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = Done()
    text_bytes = max(unit.worker_bytes - _PROCESS_BYTES, 0)
    record_bytes = text_bytes * 7 // 10
    held_out_below = int(unit.validation_fraction * 2**64)
    run = RunWriter(path, memory_bytes=text_bytes // _SPILL_SHARE)
    try:
        for extent in unit.extents:
            counted = done.by_source.setdefault(extent.source, [0, 0, 0, 0, 0])
            for item in read_extent(extent, text_column=unit.text_column, record_bytes=record_bytes, report=report):
                if isinstance(item, Problem):
                    if unit.on_error == "stop":
                        raise DataError(f"{item.message} (or pass over such records with --on-error skip)")
                    if done.skipped < _MESSAGES_OF_UNIT:
                        logger.warning(f"skipped: {item.message}")
                        done.messages.append(item.message)
                    done.skipped += 1
                    counted[4] += 1
                elif isinstance(item, Binary):
                    done.binary += 1
                    counted[3] += 1
                elif not item.text:
                    done.empty += 1
                    counted[2] += 1
                else:
                    text, doc_id = item.text, item.doc_id.encode()
                    key, rank = keyed_hashes(unit.seed, doc_id)
                    run.add(rank < held_out_below, key, doc_id, text)
                    if not done.documents or len(text) < done.smallest:
                        done.smallest, done.smallest_id = len(text), item.doc_id
                    done.documents += 1
                    counted[0] += 1
                    counted[1] += len(text)
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
    memory_bytes = (task.worker_bytes - _PROCESS_BYTES) // _STRETCH_SHARE
    try:
        for first, end, at_once in _stretches(task.piece, runs, memory_bytes):
            for doc_id, text in runs.read(first, end, task.piece.choice, at_once=at_once):
                writer.add(doc_id, text)
                report(len(text) + len(doc_id))
        entries = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    _say_done(folder, [asdict(entry) for entry in entries])


def _stretches(piece: Piece, runs: Runs, memory_bytes: int) -> Iterator[tuple[int, int, bool]]:
    """Yield stretches of the piece's buckets that fit into memory; a bucket that does not is fetched bit by bit."""
    _, sizes = runs.sizes(piece.first, piece.end)
    begin, held = piece.first, 0
    for bucket, size in enumerate(sizes.tolist(), start=piece.first):
        if held and held + size > memory_bytes:
            yield begin, bucket, held <= memory_bytes
            begin, held = bucket, 0
        held += size
    if held:
        yield begin, piece.end, held <= memory_bytes


def _say_done(path: Path, content: Any) -> None:
    temporary = path.with_name(f"{path.name}.done.json.tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, done_path(path))
