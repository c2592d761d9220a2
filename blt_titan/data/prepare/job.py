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

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from blt_titan.data.prepare.checks import (
    check_intact,
    check_out_lies_outside,
    check_same_settings,
    check_settings,
)
from blt_titan.data.prepare.destination import Destination, destination
from blt_titan.data.prepare.extents import PassedOverKind
from blt_titan.data.prepare.file_systems import is_remote
from blt_titan.data.prepare.passes import Passes
from blt_titan.data.prepare.sources import resolve_sources
from blt_titan.data.prepare.work_folder import locked, work_directory
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import Manifest
from blt_titan.data.store.shards import RECORD_BATCH_BYTES, SHARD_BYTES

MEMORY_BYTES = 1024**3
"""The default memory of a worker."""
MAX_RECORD_BYTES = 64 * 1024**2


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
    check_settings(settings, workers, memory_bytes)
    resolved = resolve_sources(sources)
    settings["sources"] = sorted(source.setting for source in resolved)
    target = destination(out)
    if work is None and is_remote(str(target)):
        raise DataError(
            f"{target}: is not on this machine, so name a directory that is, for intermediate files: --work"
        )
    folder = work_directory(work, target)
    check_out_lies_outside(target, folder, resolved)
    passes = Passes(folder, target, resolved, settings, workers, memory_bytes // workers, progress)
    with _errors_of_writing(target):
        return _prepared(passes, overwrite=overwrite)


def _prepared(passes: Passes, *, overwrite: bool) -> PrepareSummary:
    """Return what is there already, if it was made with the same settings; else make it."""
    target, folder = passes.target, passes.folder
    target.finish_removal()
    existing = target.read_manifest()
    if existing is not None and not overwrite:
        check_same_settings(target, existing.settings, passes.settings)
        check_intact(target, existing)
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while it removed it
        return PrepareSummary(str(target), existing, already_done=True)
    # Where nothing was begun, the sources are listed first: an empty one is said before anything is made.
    listing = None if folder.exists() else passes.list_sources()
    target.make()
    with locked(folder):
        manifest = passes.run(existing, listing)
        shutil.rmtree(folder, ignore_errors=True)
    return PrepareSummary(str(target), manifest, already_done=False)


@contextmanager
def _errors_of_writing(target: Destination) -> Iterator[None]:
    """Turn errors of the disk or of an object store into a sentence; their drivers have exceptions of their own."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or is_remote(str(target))):
            raise
        raise DataError(
            f"{getattr(error, 'filename', None) or target}: cannot be written "
            f"({getattr(error, 'strerror', None) or error}); free some space, check permissions, or choose another "
            "--out. Started again, it goes on where it stopped"
        ) from error
