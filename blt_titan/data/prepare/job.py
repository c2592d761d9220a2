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
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from blt_titan.data.prepare.destination import Destination, destination
from blt_titan.data.prepare.extents import Extent, PassedOverKind
from blt_titan.data.prepare.file_systems import is_remote, local_name
from blt_titan.data.prepare.plan import plan_pieces
from blt_titan.data.prepare.sources import Source, group, list_extents, resolve_sources
from blt_titan.data.prepare.work import (
    Done,
    Piece,
    ReadUnit,
    WritePiece,
    count_newlines,
    done_path,
    least_worker_bytes,
    piece_path,
    read_unit,
    runs_of,
    unit_path,
    write_piece,
)
from blt_titan.data.prepare.worker_pool import run_tasks
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import MANIFEST_NAME, SPLITS, Counts, Manifest, ShardEntry, SourceCounts
from blt_titan.data.store.shards import MAX_RECORD_BATCH_BYTES, RECORD_BATCH_BYTES, SHARD_BYTES

logger = logging.getLogger(__name__)

# Far above any sensible value, and far below the 2 GiB where Arrow's 32-bit offsets end, even for one-byte documents.
MAX_SETTABLE_RECORD_BATCH_BYTES = 64 * 1024**2
MEMORY_BYTES = 1024**3
"""Of a worker."""
MAX_RECORD_BYTES = 64 * 1024**2
WORK_DIRECTORY = ".prepare"
_FORMAT = 3
"""Of what lies in a working directory; another format is not gone on with."""
_LEAST_HELD_BYTES = 64 * 1024**2
MOST_SKIPPED_NAMED = 100
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
        passed_over = {kind: getattr(counts, kind) for kind in get_args(PassedOverKind)}
        if any(passed_over.values()):
            listed = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in passed_over.items())
            lines.append(f"  passed over: {listed}; the manifest names the first under `skipped`")
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
    max_record_bytes: int = MAX_RECORD_BYTES,
    on_error: str = "stop",
    as_text: bool = False,
    overwrite: bool = False,
    workers: int = 1,
    memory_bytes: int | None = None,
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
        max_record_bytes: a longer text file, JSON line or text of a table cannot be used; see on_error.
        on_error: what a record does that cannot be used: "stop" ends the work and names it, "skip" counts it in the
            manifest, which names the first hundred.
        as_text: take files as texts that look like records but have no name of such, as a .json file of lines; without
            it they cannot be used.
        overwrite: replace the data set that is in `out`: the files that its manifest names, and no others.
        workers: processes; 1 works in this one.
        memory_bytes: of all processes together; default 1 GiB each. A record takes up to ten times its size.
        work: where the intermediate files go, up to twice as much as the text, in a folder of their own; default `out`.
            An `out` that is not here needs one.
        progress: show progress bars.

    Raises:
        DataError: a setting, a source or `out` cannot be used, or the disk is full.
    """
    for name, given in (*(("source", source) for source in sources), ("out", out), ("work", work)):
        if given is not None and not os.fspath(given):
            raise DataError(f"{name} is empty; name it, or check the variable of the shell that it comes from")
    settings: dict[str, Any] = {
        "sources": [],
        "seed": seed,
        "validation_fraction": float(validation_fraction),
        "max_bytes": max_bytes,
        "record_batch_bytes": record_batch_bytes,
        "shard_bytes": shard_bytes,
        "text_column": text_column,
        "max_record_bytes": max_record_bytes,
        "on_error": on_error,
        # Data sets that were made before the setting was there are made without it.
        **({"as_text": True} if as_text else {}),
    }
    memory_bytes = MEMORY_BYTES * workers if memory_bytes is None else memory_bytes
    _check_settings(settings, workers, memory_bytes)
    resolved = resolve_sources(sources)
    settings["sources"] = sorted(source.setting for source in resolved)
    target = destination(out)
    if work is None and is_remote(str(target)):
        raise DataError(
            f"{target}: is not on this machine, so name a directory that is, for intermediate files: --work"
        )
    folder = _work_directory(work, target)
    _check_out_lies_outside(target, folder, resolved)
    try:
        target.finish_removal()
        existing = target.read_manifest()
        if existing is not None and not overwrite:
            _check_same_settings(target, existing.settings, settings)
            _check_intact(target, existing)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it did so
            return PrepareSummary(str(target), existing, already_done=True)
        first_listing = None
        if not folder.exists():
            # A source that holds nothing is said before anything is made.
            listed = list_extents(resolved, revisions := {})
            first_listing = (listed, revisions)
        target.make()
        with _locked(folder):
            job = _Job(
                folder, target, existing, resolved, settings, workers, memory_bytes // workers, progress, first_listing
            )
            manifest = job.run()
            shutil.rmtree(folder, ignore_errors=True)
    except DataError:
        raise
    except Exception as error:
        # The drivers of object stores have exceptions of their own.
        if not (isinstance(error, OSError) or is_remote(str(target))):
            raise
        raise DataError(
            f"{getattr(error, 'filename', None) or target}: cannot be written "
            f"({getattr(error, 'strerror', None) or error}); free some space, check permissions, or choose another "
            "--out. Started again, it goes on where it stopped"
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
    first_listing: tuple[list[Extent], dict[str, str]] | None = None
    """The extents of all sources and the commits of the hub's, where nothing was begun before."""

    def __post_init__(self):
        self._revisions: dict[str, str] = {}

    def run(self) -> Manifest:
        """Do what is not done yet, and install it."""
        units = self._begin()
        done = self._read(units)
        self._check_records(done)
        runs = runs_of(self.folder, len(units))
        plan = plan_pieces(runs, done, self.settings)
        entries, moves = self._write(len(units), plan.pieces, plan.text_bytes)
        splits = {split: entries[split] for split in SPLITS}
        counts = Counts(
            documents=plan.documents,
            text_bytes=sum(shard.text_bytes for shards in splits.values() for shard in shards),
            empty_documents_left_out=sum(unit.empty for unit in done),
            binary_files_left_out=sum(unit.binary for unit in done),
            documents_over_max_bytes=plan.over_max_bytes,
            skipped_records=sum(unit.skipped for unit in done),
            **{kind: sum(unit.passed_over.get(kind, 0) for unit in done) for kind in get_args(PassedOverKind)},
        )
        assert plan.documents == sum(shard.documents for shards in splits.values() for shard in shards)
        manifest = Manifest(self.settings, counts, splits, self._by_source(done), self._skipped(done))
        self._check_names_are_free(moves)
        self.target.install(moves, manifest, self.existing)
        return manifest

    def _begin(self) -> list[ReadUnit]:
        """List the work; what is there of other work goes."""
        plan_path = self.folder / "plan.json"
        plan = json.loads(plan_path.read_bytes()) if plan_path.exists() else {}
        same_work = {"format": _FORMAT, "target": os.path.abspath(str(self.target)), "settings": dict(self.settings)}
        # A data set of the hub is read as it was when the work began.
        revisions = dict(plan.get("revisions", {})) if plan.get("work") == same_work else {}
        if self.first_listing is not None:
            extents, revisions = self.first_listing
        else:
            extents = list_extents(self.sources, revisions)
        units = group(extents)
        for extent in (extent for unit in units for extent in unit):
            self._check_is_not_ours(extent)
        digest = hashlib.sha256(
            json.dumps([[asdict(extent) for extent in unit] for unit in units]).encode()
        ).hexdigest()
        wanted = {"work": same_work, "revisions": revisions, "digest": digest}
        if plan != wanted:
            if plan:
                logger.warning(f"{self.folder}: sources or settings are others than before: beginning anew")
            for path in self.folder.iterdir():
                if path.name != _LOCK_NAME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.target.discard_installing(self.existing)
            write_atomically(plan_path, json.dumps(wanted).encode())
        self._revisions = revisions
        return [
            ReadUnit(
                number=number,
                folder=str(self.folder),
                extents=tuple(unit),
                seed=self.settings["seed"],
                validation_fraction=self.settings["validation_fraction"],
                text_column=self.settings["text_column"],
                on_error=self.settings["on_error"],
                max_record_bytes=self.settings["max_record_bytes"],
                worker_bytes=self.worker_bytes,
                as_text=self.settings.get("as_text", False),
            )
            for number, unit in enumerate(self._number_lines(units))
        ]

    def _check_is_not_ours(self, extent: Extent) -> None:
        ours = [str(self.folder.absolute()), local_name(str(self.target))]
        ours[1] = ours[1] if is_remote(ours[1]) else os.path.abspath(ours[1])
        if any(f"{extent.path}/".startswith(f"{folder}/") for folder in ours):
            raise DataError(
                f"{extent.path}: is a source, and lies in what this run writes; choose another --out or --work"
            )

    def _number_lines(self, units: list[list[Extent]]) -> list[list[Extent]]:
        """Count the lines before the parts of large files, once."""
        counted = self.folder / "lines.json"
        parts = [e for unit in units for e in unit if e.format == "lines" and e.end >= 0]
        if not parts:
            return units
        if not counted.exists():
            # Nothing follows a last part.
            found = self._run(count_newlines, [part for part in parts if part.end < part.file_bytes], "counting lines")
            write_atomically(counted, json.dumps([newlines for _, newlines in found]).encode())
        before: dict[Extent, int] = {}
        newlines = iter(json.loads(counted.read_bytes()))
        first = 0
        for part in parts:
            before[part] = first = first if part.begin else 0
            first += next(newlines) if part.end < part.file_bytes else 0
        return [[replace(extent, first=before.get(extent, extent.first)) for extent in unit] for unit in units]

    def _run(
        self, function: Any, tasks: Sequence[Any], description: str, total: int | None = None, done: int = 0
    ) -> Any:
        return run_tasks(
            function,
            tasks,
            workers=self.workers,
            total_bytes=sum(task.size_bytes for task in tasks) if total is None else total,
            done_bytes=done,
            description=description,
            progress=self.progress,
        )

    def _read(self, units: Sequence[ReadUnit]) -> list[Done]:
        done = {unit.number: found for unit in units if (found := Done.read(unit_path(self.folder, unit.number)))}
        left = [unit for unit in units if unit.number not in done]
        sizes = [unit.size_bytes for unit in units]
        finished = self._run(read_unit, left, "reading", sum(sizes), sum(sizes[number] for number in done))
        return [found for _, found in sorted({**done, **{unit.number: found for unit, found in finished}}.items())]

    def _check_records(self, done: Sequence[Done]) -> None:
        if not any(unit.documents for unit in done):
            raise DataError(
                f"{', '.join(self.settings['sources'])}: no documents, but {sum(unit.empty for unit in done)} empty "
                f"ones, {sum(unit.binary for unit in done)} binary files and {sum(unit.skipped for unit in done)} "
                "records that could not be used; name a source that holds text"
            )

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
        undone = {task.piece for task in left}
        written = [entry for piece in pieces if piece not in undone for entry in self._entries_of(piece)]
        self._run(write_piece, left, "writing", text_bytes, sum(entry.text_bytes for entry in written))
        entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        moves: dict[str, Path] = {}
        for piece in pieces:
            of_split = entries[piece.split]
            for entry in self._entries_of(piece):
                name = f"{piece.split}-{len(of_split):05d}"
                of_split.append(replace(entry, file=f"{name}.arrow", index_file=f"{name}.index.npy"))
                moves[f"{name}.arrow"] = piece_path(self.folder, piece) / entry.file
                moves[f"{name}.index.npy"] = piece_path(self.folder, piece) / entry.index_file
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
            SourceCounts(source.setting, *total.tolist(), revision=self._revisions.get(source.root, ""))
            for source, total in zip(self.sources, totals, strict=True)
        )

    def _skipped(self, done: Sequence[Done]) -> tuple[str, ...]:
        skipped = [message for unit in done for message in unit.messages]
        passed_over = [message for unit in done for message in unit.passed_over_messages]
        return (*skipped[:MOST_SKIPPED_NAMED], *passed_over[:MOST_SKIPPED_NAMED])

    def _check_names_are_free(self, moves: Mapping[str, Path]) -> None:
        replaceable = self.target.installing() | (self.existing.file_names() if self.existing else set())
        for name in sorted(moves.keys() - replaceable):
            if self.target.size(name) is not None:
                raise DataError(
                    f"{self.target}/{name}: is there already, and no manifest names it; move it away, or choose "
                    "another --out"
                )


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


def _work_directory(work: str | os.PathLike[str] | None, target: Destination) -> Path:
    """Return the folder of this work's intermediate files; no other files are in it."""
    if work is None:
        return Path(str(target)) / WORK_DIRECTORY
    of_target = hashlib.sha256(os.path.abspath(str(target)).encode()).hexdigest()[:12]
    return Path(work) / f"{WORK_DIRECTORY}-{of_target}"


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
    if not 1 <= settings["max_record_bytes"] <= MAX_RECORD_BATCH_BYTES:
        refuse("max_record_bytes", settings["max_record_bytes"], f"from 1 to {MAX_RECORD_BATCH_BYTES}")
    if memory_bytes < workers * (least := least_memory_bytes(settings["max_record_bytes"])):
        refuse(
            "memory",
            memory_bytes,
            f"{least * workers} or more: {least} for each of {workers} workers, who may meet records of "
            f"{settings['max_record_bytes']} bytes; take fewer --workers, or lower --max-record-bytes",
        )


def least_memory_bytes(max_record_bytes: int) -> int:
    """Return what each worker must be allowed."""
    return least_worker_bytes(max_record_bytes) + _LEAST_HELD_BYTES


def _check_out_lies_outside(target: Destination, folder: Path, sources: Sequence[Source]) -> None:
    for written in (local_name(str(target)), str(folder)):
        for source in sources:
            if source.kind in ("hub", "pattern") or is_remote(source.root) != is_remote(written):
                continue
            if is_remote(written):
                inside = f"{written}/".startswith(f"{source.root}/")
            else:
                inside = Path(written).resolve().is_relative_to(Path(source.root).resolve())
            if inside:
                raise DataError(
                    f"{written}: lies inside the source {source.setting}, which would then hold its own shards; "
                    "choose another --out or --work"
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
