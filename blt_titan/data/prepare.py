"""Turn sources into a data set of byte shards with a manifest: a global shuffle in bounded memory, in two passes.

In: source names and settings. Out: shards of two splits, train and validation. A document's place depends on nothing
but the seed and its id: documents are taken in the order of one keyed hash, and go to validation if another is below
the fraction. The order of listing, the number of workers, and their memory change nothing.

    pass 1   units of some 64 MiB of sources        -> sorted runs (`runs.py`), one for each unit
    pass 2   pieces: buckets in a row, about a shard -> shards
    install  shards are renamed into place, the manifest last

Everything before the last step lies in a working directory, `OUT/.prepare` unless another is named, and every unit and
piece that is finished has a file that says so. A run that was stopped, by whatever, goes on behind them.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blt_titan.data.destination import Destination, destination
from blt_titan.data.errors import DataError
from blt_titan.data.manifest import MANIFEST_NAME, SPLITS, Counts, Manifest, ShardEntry, SourceCounts
from blt_titan.data.prepare_work import (
    Done,
    Piece,
    ReadUnit,
    WritePiece,
    done_path,
    piece_path,
    read_unit,
    runs_of,
    unit_path,
    write_piece,
)
from blt_titan.data.runs import BUCKET_BITS, BUCKETS, Choice, Runs
from blt_titan.data.shards import RECORD_BATCH_BYTES, SHARD_BYTES, TEMPORARY_SUFFIX
from blt_titan.data.sources import Source, group, is_remote, list_extents, resolve_sources
from blt_titan.data.worker_pool import run_tasks

# Far above any sensible value, and far below the 2 GiB where Arrow's 32-bit offsets end, even for one-byte documents.
MAX_SETTABLE_RECORD_BATCH_BYTES = 64 * 1024**2
MEMORY_BYTES = 1024**3
LEAST_WORKER_BYTES = 256 * 1024**2
WORK_DIRECTORY = ".prepare"
MOST_SKIPPED_NAMED = 100
_INDEX_ROWS_AT_ONCE = 1_000_000
_LOCK_NAME = "lock"


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """What a data set holds after `prepare`; `str()` gives a few lines to print."""

    directory: str
    manifest: Manifest
    already_done: bool

    def __str__(self) -> str:
        counts = self.manifest.counts
        lines = []
        if self.already_done:
            lines.append(f"{self.directory}: nothing to do, already prepared with these settings")
        lines.append(f"{self.directory}: {counts.documents:,} documents, {counts.text_bytes:,} bytes")
        for split, shards in self.manifest.splits.items():
            plural = "" if len(shards) == 1 else "s"
            lines.append(
                f"  {split}: {sum(s.documents for s in shards):,} documents, "
                f"{sum(s.text_bytes for s in shards):,} bytes, "
                f"{sum(s.record_batches for s in shards):,} record batches in {len(shards):,} shard{plural}"
            )
        lines.append(
            f"  left out: {counts.empty_documents_left_out:,} empty documents, {counts.binary_files_left_out:,} "
            f"binary files, {counts.documents_over_max_bytes:,} documents over max_bytes, "
            f"{counts.skipped_records:,} records that could not be used"
        )
        return "\n".join(lines)


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    validation_fraction: float,
    seed: int,
    max_bytes: int | None = None,
    record_batch_bytes: int = RECORD_BATCH_BYTES,
    shard_bytes: int = SHARD_BYTES,
    text_column: str = "text",
    on_error: str = "stop",
    overwrite: bool = False,
    workers: int = 1,
    memory_bytes: int = MEMORY_BYTES,
    work: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PrepareSummary:
    """Write the documents of `sources` as byte shards into `out`, or go on with what an interrupted call began.

    A data set that was finished with the same settings is left as it is; whether the sources changed since is not
    looked at.

    Args:
        sources: what to read; see `sources.py`.
        out: the directory or the fsspec URL to write; made if missing. Other files in it are left alone.
        validation_fraction: the share of documents that goes to validation, in [0, 1). If it is not 0 and there are two
            documents or more, each split gets at least one; one document alone goes to train.
        seed: orders the documents and chooses those of validation.
        max_bytes: take documents in the seed's order while they fit into this many bytes of text, passing over those
            that do not; None takes all. All sources are read even so.
        record_batch_bytes: text per record batch; the smallest unit that is read, checked and shuffled.
        shard_bytes: size of a shard file.
        text_column: where the records of JSON lines, Parquet, Arrow and the hub keep their text.
        on_error: what a record does that cannot be used: "stop" ends the work and names it, "skip" counts it in the
            manifest, which names the first hundred.
        overwrite: replace the data set that is in `out`: the files that its manifest names, and no others.
        workers: processes; 1 works in this one.
        memory_bytes: of all processes together.
        work: where the intermediate files go, as much as the text; default OUT/.prepare. An `out` that is not here
            needs one.
        progress: show progress bars.

    Raises:
        DataError: a setting, a source or `out` cannot be used, or the disk is full.
    """
    settings: dict[str, Any] = {
        "sources": [],
        "seed": seed,
        "validation_fraction": float(validation_fraction),
        "max_bytes": max_bytes,
        "record_batch_bytes": record_batch_bytes,
        "shard_bytes": shard_bytes,
        "text_column": text_column,
        "on_error": on_error,
    }
    _check_settings(settings, workers, memory_bytes)
    resolved = resolve_sources(sources)
    settings["sources"] = sorted(source.setting for source in resolved)
    target = destination(out)
    _check_out_lies_outside(target, resolved)
    if work is None and is_remote(str(target)):
        raise DataError(
            f"{target}: is not on this machine, so name a directory that is, for intermediate files: --work"
        )
    try:
        existing = target.read_manifest()
        if existing is not None and not overwrite:
            _check_same_settings(target, existing.settings, settings)
            _check_intact(target, existing)
            return PrepareSummary(str(target), existing, already_done=True)
        target.make()
        folder = Path(work) if work is not None else Path(out) / WORK_DIRECTORY
        with _locked(folder):
            job = _Job(folder, target, existing, resolved, settings, workers, memory_bytes // workers, progress)
            manifest = job.run()
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: cannot be written ({error.strerror or error}); free some space, check "
            "permissions, or choose another --out. Started again, it goes on where it stopped"
        ) from error
    return PrepareSummary(str(target), manifest, already_done=False)


@dataclass
class _Job:
    """The work of one call, as it stands in its working directory."""

    folder: Path
    target: Destination
    existing: Manifest | None
    sources: Sequence[Source]
    settings: Mapping[str, Any]
    workers: int
    worker_bytes: int
    progress: bool

    def run(self) -> Manifest:
        """Do what is not done yet, and install it."""
        units = self._begin()
        done = self._read(units)
        self._check_records(done)
        runs = runs_of(self.folder, len(units))
        pieces, documents, text_bytes, over = self._plan(runs, done)
        entries, moves = self._write(len(units), pieces, text_bytes)
        splits = {split: entries[split] for split in SPLITS}
        counts = Counts(
            documents=documents,
            text_bytes=sum(shard.text_bytes for shards in splits.values() for shard in shards),
            empty_documents_left_out=sum(unit.empty for unit in done),
            binary_files_left_out=sum(unit.binary for unit in done),
            documents_over_max_bytes=over,
            skipped_records=sum(unit.skipped for unit in done),
        )
        assert documents == sum(shard.documents for shards in splits.values() for shard in shards)
        manifest = Manifest(self.settings, counts, splits, self._by_source(done), self._skipped(done))
        self._check_names_are_free(moves)
        self.target.install(moves, manifest, self.existing)
        return manifest

    def _begin(self) -> list[ReadUnit]:
        """List the work; what is there of other work goes."""
        extents = list_extents(self.sources)
        common = (self.settings["seed"], self.settings["validation_fraction"], self.settings["text_column"])
        units = [
            ReadUnit(number, str(self.folder), tuple(unit), *common, self.settings["on_error"], self.worker_bytes)
            for number, unit in enumerate(group(extents))
        ]
        digest = hashlib.sha256(
            json.dumps([self.settings, [asdict(extent) for extent in extents]]).encode()
        ).hexdigest()
        plan = self.folder / "plan.json"
        if not plan.exists() or json.loads(plan.read_bytes())["digest"] != digest:
            for path in self.folder.iterdir():
                if path.name != _LOCK_NAME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.target.discard_installing(self.existing)
            _write_json(plan, {"digest": digest})
        return units

    def _read(self, units: Sequence[ReadUnit]) -> list[Done]:
        done = {unit.number: found for unit in units if (found := Done.read(unit_path(self.folder, unit.number)))}
        sizes = [sum(extent.size_bytes for extent in unit.extents) for unit in units]
        finished = run_tasks(
            read_unit,
            [unit for unit in units if unit.number not in done],
            workers=self.workers,
            total_bytes=sum(sizes)
            if all(e.size_bytes or e.format != "hub" for u in units for e in u.extents)
            else None,
            done_bytes=sum(sizes[number] for number in done),
            description="reading",
            progress=self.progress,
        )
        return [found for _, found in sorted({**done, **{unit.number: found for unit, found in finished}}.items())]

    def _check_records(self, done: Sequence[Done]) -> None:
        if not any(unit.documents for unit in done):
            raise DataError(
                f"{', '.join(self.settings['sources'])}: no documents, but {sum(unit.empty for unit in done)} empty "
                f"ones, {sum(unit.binary for unit in done)} binary files and {sum(unit.skipped for unit in done)} "
                "records that could not be used; name a source that holds text"
            )

    def _plan(self, runs: Runs, done: Sequence[Done]) -> tuple[list[Piece], int, int, int]:
        """Return the pieces, documents and bytes that are taken, and documents that max_bytes leaves out."""
        documents, sizes = runs.sizes()
        choice, total = Choice(), int(documents.sum())
        if (most := self.settings["max_bytes"]) is not None:
            choice = self._choose(runs, documents, done, most)
            documents, sizes = _taken(runs, documents, choice)
        in_split = [int(documents[:BUCKETS].sum()), int(documents[BUCKETS:].sum())]
        moved: list[Piece] = []
        wants_validation = self.settings["validation_fraction"] > 0 and sum(in_split) > 1
        if not in_split[0] or (wants_validation and not in_split[1]):
            # The first document of train goes to validation, or the last of validation to train.
            empty = in_split.index(0)
            there = np.flatnonzero(documents)
            bucket = int(there[0] if empty == 1 else there[-1])
            rows = runs.rows(bucket, bucket + 1)
            keys = rows[choice.mask(rows)]["key"]
            key = int(keys.min() if empty == 1 else keys.max())
            moved = [Piece(SPLITS[empty], 0, bucket, bucket + 1, replace(choice, only=key))]
            choice = replace(choice, without=key)
        per_document = 24  # offsets and padding, about
        planned = sizes + per_document * documents
        pieces = moved + [
            Piece(SPLITS[split], number, begin, end, replace(choice, later=_keys_in(choice.later, begin, end)))
            for split in range(2)
            if in_split[split]
            for number, (begin, end) in enumerate(self._buckets_of_pieces(planned, split * BUCKETS))
        ]
        return pieces, sum(in_split), int(sizes.sum()), total - sum(in_split)

    def _buckets_of_pieces(self, sizes: np.ndarray, first: int) -> Iterator[tuple[int, int]]:
        """Cut the buckets of a split where the next one would make a piece longer than a shard."""
        begin, held = first, 0
        for bucket in range(first, first + BUCKETS):
            if held and held + sizes[bucket] > self.settings["shard_bytes"]:
                yield begin, bucket
                begin, held = bucket, 0
            held += int(sizes[bucket])
        yield begin, first + BUCKETS

    def _choose(self, runs: Runs, documents: np.ndarray, done: Sequence[Done], most_bytes: int) -> Choice:
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

    def _write(
        self, units: int, pieces: Sequence[Piece], text_bytes: int
    ) -> tuple[dict[str, tuple[ShardEntry, ...]], dict[str, Path]]:
        """Write the shards; return their entries by split, and where each file is now."""
        tasks = [
            WritePiece(
                str(self.folder),
                piece,
                units,
                self.settings["record_batch_bytes"],
                self.settings["shard_bytes"],
                self.worker_bytes,
            )
            for piece in pieces
        ]
        left = [task for task in tasks if not done_path(piece_path(self.folder, task.piece)).exists()]
        written = {task.piece: self._entries_of(task.piece) for task in tasks if task not in left}
        done_bytes = sum(entry.text_bytes for entries in written.values() for entry in entries)
        run_tasks(
            write_piece,
            left,
            workers=self.workers,
            total_bytes=text_bytes,
            done_bytes=done_bytes,
            description="writing",
            progress=self.progress,
        )
        entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        moves: dict[str, Path] = {}
        for piece in pieces:
            of_split = entries[piece.split]
            for entry in self._entries_of(piece):
                name = f"{piece.split}-{len(of_split):05d}"
                of_split.append(replace(entry, file=f"{name}.arrow", index_file=f"{name}.index.npy"))
                for was, becomes in ((entry.file, f"{name}.arrow"), (entry.index_file, f"{name}.index.npy")):
                    moves[becomes] = piece_path(self.folder, piece) / (was + TEMPORARY_SUFFIX)
        return {split: tuple(of_split) for split, of_split in entries.items()}, moves

    def _entries_of(self, piece: Piece) -> list[ShardEntry]:
        content = json.loads(done_path(piece_path(self.folder, piece)).read_bytes())
        return [ShardEntry(**entry) for entry in content]

    def _by_source(self, done: Sequence[Done]) -> tuple[SourceCounts, ...]:
        totals = [np.array([0, 0, 0, 0, 0]) for _ in self.sources]
        for unit in done:
            for number, counted in unit.by_source.items():
                totals[number] += counted
        return tuple(
            SourceCounts(source.setting, *total.tolist()) for source, total in zip(self.sources, totals, strict=True)
        )

    def _skipped(self, done: Sequence[Done]) -> tuple[str, ...]:
        return tuple(message for unit in done for message in unit.messages)[:MOST_SKIPPED_NAMED]

    def _check_names_are_free(self, moves: Mapping[str, Path]) -> None:
        replaceable = self.target.installing() | (self.existing.file_names() if self.existing else set())
        for name in sorted(moves.keys() - replaceable):
            if self.target.exists(name):
                raise DataError(
                    f"{self.target}/{name}: is there already, and no manifest names it; move it away, or choose "
                    "another --out"
                )


def _keys_in(keys: Sequence[int], first: int, end: int) -> tuple[int, ...]:
    """Return the keys of some buckets of one split."""
    shift, split = 64 - BUCKET_BITS, first // BUCKETS * BUCKETS
    return tuple(key for key in keys if first <= split + (key >> shift) < end)


def _stretches_of_buckets(documents: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield stretches of buckets, of both splits together, whose index rows fit into memory easily."""
    begin, held = 0, 0
    for bucket, count in enumerate((documents[:BUCKETS] + documents[BUCKETS:]).tolist()):
        if held and held + count > _INDEX_ROWS_AT_ONCE:
            yield begin, bucket
            begin, held = bucket, 0
        held += count
    yield begin, BUCKETS


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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a working directory for this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing this data set; wait for it, or stop it") from None
        yield


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _check_settings(settings: Mapping[str, Any], workers: int, memory_bytes: int) -> None:
    def refuse(name: str, value: Any, allowed: str) -> None:
        raise DataError(f"{name} is {value}; it may be {allowed}")

    if not 0 <= settings["validation_fraction"] < 1:
        refuse("validation_fraction", settings["validation_fraction"], "from 0 to below 1")
    if not 0 <= settings["seed"] < 2**63:
        refuse("seed", settings["seed"], "from 0 to 2**63 - 1")
    if settings["max_bytes"] is not None and settings["max_bytes"] < 1:
        refuse("max_bytes", settings["max_bytes"], "1 or more")
    if not 1 <= settings["record_batch_bytes"] <= MAX_SETTABLE_RECORD_BATCH_BYTES:
        refuse("record_batch_bytes", settings["record_batch_bytes"], f"from 1 to {MAX_SETTABLE_RECORD_BATCH_BYTES}")
    if settings["shard_bytes"] < 1:
        refuse("shard_bytes", settings["shard_bytes"], "1 or more")
    if settings["on_error"] not in ("stop", "skip"):
        refuse("on_error", repr(settings["on_error"]), "'stop' or 'skip'")
    if workers < 1:
        refuse("workers", workers, "1 or more")
    if memory_bytes < workers * LEAST_WORKER_BYTES:
        refuse("memory", memory_bytes, f"{LEAST_WORKER_BYTES} or more for each of {workers} workers")


def _check_out_lies_outside(target: Destination, sources: Sequence[Source]) -> None:
    out = str(target)
    for source in sources:
        if source.kind in ("hub", "pattern") or is_remote(source.root) != is_remote(out):
            continue
        if is_remote(out):
            inside = f"{out}/".startswith(f"{source.root}/")
        else:
            inside = Path(out).resolve().is_relative_to(Path(source.root).resolve())
        if inside:
            raise DataError(
                f"{out}: lies inside the source {source.setting}, which would then hold its own shards; "
                "choose another --out"
            )


def _check_same_settings(target: Destination, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if differing:
        listed = ", ".join(f"{key} {there.get(key)!r} there, {wanted.get(key)!r} now" for key in differing)
        raise DataError(
            f"{target}/{MANIFEST_NAME}: made with other settings ({listed}); choose another --out, or pass --overwrite"
        )


def _check_intact(target: Destination, manifest: Manifest) -> None:
    try:
        target.check_intact(manifest)
    except DataError as error:
        raise DataError(f"{error} (with --overwrite)") from error
