"""The two passes of `prepare`: sources to sorted runs, sorted runs to shards, and the rename into place.

In: resolved sources and checked settings. Out: the manifest. A unit or a piece counts as done when its file says so, so
a run that was stopped continues after what it finished.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from blt_titan.data.prepare.destination import Destination
from blt_titan.data.prepare.extents import Extent, PassedOverKind
from blt_titan.data.prepare.file_systems import is_remote, local_name
from blt_titan.data.prepare.plan import plan_pieces
from blt_titan.data.prepare.sources import Source, group, list_extents
from blt_titan.data.prepare.work import (
    Done,
    Piece,
    ReadUnit,
    WritePiece,
    count_newlines,
    done_path,
    piece_path,
    read_unit,
    runs_of,
    unit_path,
    write_piece,
)
from blt_titan.data.prepare.work_folder import LOCK_NAME
from blt_titan.data.prepare.worker_pool import run_tasks
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import SPLITS, Counts, Manifest, ShardEntry, SourceCounts

logger = logging.getLogger(__name__)

_FORMAT = 3
"""The format of a working directory; work of another format begins anew."""
MOST_SKIPPED_NAMED = 100
Listing = tuple[list[Extent], dict[str, str]]
"""The extents of all sources, and the commit of each data set of the hub."""


@dataclass
class Passes:
    """The two passes of one call, as far as its working directory says that they are done."""

    folder: Path
    target: Destination
    sources: Sequence[Source]
    settings: Mapping[str, Any]
    workers: int
    worker_bytes: int
    progress: bool

    def __post_init__(self):
        self._existing: Manifest | None = None
        self._revisions: dict[str, str] = {}

    def list_sources(self) -> Listing:
        """List all sources, those of the hub at their newest commits."""
        revisions: dict[str, str] = {}
        return list_extents(self.sources, revisions), revisions

    def run(self, existing: Manifest | None, listing: Listing | None) -> Manifest:
        """Do what is not done yet, and install it.

        Args:
            existing: the manifest that will be replaced, if there is one.
            listing: what `list_sources` found, if nothing was begun before.
        """
        self._existing = existing
        units = self._begin(listing)
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
        self.target.install(moves, manifest, self._existing)
        return manifest

    def _begin(self, listing: Listing | None) -> list[ReadUnit]:
        """List the work; what is there of other work goes."""
        plan_path = self.folder / "plan.json"
        plan = json.loads(plan_path.read_bytes()) if plan_path.exists() else {}
        same_work = {"format": _FORMAT, "target": os.path.abspath(str(self.target)), "settings": dict(self.settings)}
        # A data set of the hub is read as it was when the work began.
        revisions = dict(plan.get("revisions", {})) if plan.get("work") == same_work else {}
        if listing is not None:
            extents, revisions = listing
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
                if path.name != LOCK_NAME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.target.discard_installing(self._existing)
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
        replaceable = self.target.installing() | (self._existing.file_names() if self._existing else set())
        for name in sorted(moves.keys() - replaceable):
            if self.target.size(name) is not None:
                raise DataError(
                    f"{self.target}/{name}: is there already, and no manifest names it; move it away, or choose "
                    "another --out"
                )
