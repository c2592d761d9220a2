"""Turn sources into a directory of byte shards with a manifest.

In: source names and settings. Out: shards of two splits, train and validation. Where a document goes depends
on nothing but the seed and its id: documents are taken in the order of one keyed hash, and go to validation
if another is below the fraction. The order in which a file system lists files therefore changes nothing.

Nothing in the directory changes until every byte is written: shards are written beside what is there under
temporary names, then renamed, and the manifest is replaced last. `manifest.json.installing` names the files
while they are renamed, so the next run knows which ones an interrupted run left.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blt_titan.data.errors import DataError
from blt_titan.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Counts,
    Manifest,
    ShardEntry,
    read_manifest,
    write_manifest,
)
from blt_titan.data.shards import (
    RECORD_BATCH_BYTES,
    SHARD_BYTES,
    TEMPORARY_SUFFIX,
    ShardSet,
    ShardWriter,
    install,
)
from blt_titan.data.sources import Document, Source, list_documents, resolve_sources

# Far above any sensible value, and far below the 2 GiB where Arrow's 32-bit offsets end, even for one-byte documents.
MAX_SETTABLE_RECORD_BATCH_BYTES = 64 * 1024**2
_INSTALLING_NAME = f"{MANIFEST_NAME}.installing"


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """What a directory holds after `prepare`; `str()` gives a few lines to print."""

    directory: Path
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
            f"binary files, {counts.documents_over_max_bytes:,} documents over max_bytes"
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
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Write the documents of `sources` as byte shards into `out`.

    A directory that was finished with the same settings is left as it is; whether the sources changed since
    is not looked at.

    Args:
        sources: "python-stdlib", directories, files; see `sources.py`.
        out: the directory to write; made if missing. Other files in it are left alone.
        validation_fraction: the share of documents that goes to validation, in [0, 1). If it is not 0 and there are two
            documents or more, each split gets at least one; one document alone goes to train.
        seed: orders the documents and chooses those of validation.
        max_bytes: take documents in the seed's order while they fit into this many bytes of text, passing
            over those that do not; None takes all.
        record_batch_bytes: text per record batch; the smallest unit that is read, checked and shuffled.
        shard_bytes: size of a shard file.
        text_column: the key of the text in `.jsonl` files.
        overwrite: replace the data set that is in `out`: the files that its manifest names, and no others.
        progress: show progress bars.

    Raises:
        DataError: a setting, a source or `out` cannot be used, or the disk is full. `out` is then as it was before.
    """
    out = Path(out)
    _check_settings(validation_fraction, seed, max_bytes, record_batch_bytes, shard_bytes)
    resolved = resolve_sources(sources)
    settings: dict[str, Any] = {
        "sources": sorted(source.setting for source in resolved),
        "seed": seed,
        "validation_fraction": float(validation_fraction),
        "max_bytes": max_bytes,
        "record_batch_bytes": record_batch_bytes,
        "shard_bytes": shard_bytes,
        "text_column": text_column,
    }
    _check_out_lies_outside(out, resolved)
    existing = read_manifest(out) if (out / MANIFEST_NAME).exists() else None
    if existing is not None and not overwrite:
        _check_same_settings(out, existing.settings, settings)
        _check_intact(out, existing)
        return PrepareSummary(out, existing, already_done=True)

    listing = list_documents(resolved, text_column=text_column, progress=progress)
    if not listing.documents:
        raise DataError(
            f"{', '.join(settings['sources'])}: no documents, but {listing.empty_documents} empty ones and "
            f"{listing.binary_files} binary files; name a source that holds text"
        )
    chosen = _choose(listing.documents, seed, max_bytes)
    parts = _split(chosen, seed, validation_fraction)
    counts = Counts(
        documents=len(chosen),
        text_bytes=sum(document.size_bytes for document in chosen),
        empty_documents_left_out=listing.empty_documents,
        binary_files_left_out=listing.binary_files,
        documents_over_max_bytes=len(listing.documents) - len(chosen),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out, existing)
        with tqdm(total=counts.text_bytes, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
            splits = {
                split: _write_split(out, split, parts[split], record_batch_bytes, shard_bytes, bar) for split in SPLITS
            }
        manifest = Manifest(settings, counts, splits)
        _install(out, manifest, existing)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}); "
            "free some space, check permissions, or choose another --out"
        ) from error
    return PrepareSummary(out, manifest, already_done=False)


def _check_settings(
    validation_fraction: float, seed: int, max_bytes: int | None, record_batch_bytes: int, shard_bytes: int
) -> None:
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}; it may be from 0 to below 1")
    if not 0 <= seed < 2**63:
        raise DataError(f"seed is {seed}; it may be from 0 to 2**63 - 1")
    if max_bytes is not None and max_bytes < 1:
        raise DataError(f"max_bytes is {max_bytes}; it may be 1 or more")
    if not 1 <= record_batch_bytes <= MAX_SETTABLE_RECORD_BATCH_BYTES:
        raise DataError(
            f"record_batch_bytes is {record_batch_bytes}; it may be from 1 to {MAX_SETTABLE_RECORD_BATCH_BYTES}"
        )
    if shard_bytes < 1:
        raise DataError(f"shard_bytes is {shard_bytes}; it may be 1 or more")


def _check_out_lies_outside(out: Path, sources: Sequence[Source]) -> None:
    for source in sources:
        if out.resolve().is_relative_to(source.root.resolve()):
            raise DataError(
                f"{out}: lies inside the source {source.setting}, which would then hold its own shards; "
                "choose another --out"
            )


def _check_same_settings(out: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if differing:
        listed = ", ".join(f"{key} {there.get(key)!r} there, {wanted.get(key)!r} now" for key in differing)
        raise DataError(
            f"{out / MANIFEST_NAME}: made with other settings ({listed}); choose another --out, or pass --overwrite"
        )


def _check_intact(out: Path, manifest: Manifest) -> None:
    try:
        for split, shards in manifest.splits.items():
            if shards:
                ShardSet(out, split).verify_structure()
    except DataError as error:
        raise DataError(f"{error} (with --overwrite)") from error


def _keyed_hash(purpose: bytes, seed: int, doc_id: str) -> int:
    """Give 64 bits that depend on the purpose, the seed and the document's id alone."""
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8, key=key, person=purpose).digest())


def _choose(documents: Sequence[Document], seed: int, max_bytes: int | None) -> list[Document]:
    """Order the documents by the seed, and keep those that fit into `max_bytes`."""
    ordered = sorted(documents, key=lambda d: (_keyed_hash(b"order", seed, d.doc_id), d.doc_id))
    for before, after in pairwise(ordered):
        if before.doc_id == after.doc_id:
            raise DataError(f"{after.path}: a second document with the id {after.doc_id!r}; rename the file")
    if max_bytes is None:
        return ordered
    chosen, left_bytes = [], max_bytes
    for document in ordered:
        if document.size_bytes <= left_bytes:
            chosen.append(document)
            left_bytes -= document.size_bytes
    if not chosen:
        smallest = min(documents, key=lambda d: d.size_bytes)
        raise DataError(
            f"{smallest.path}: the smallest document has {smallest.size_bytes} bytes, "
            f"more than max_bytes {max_bytes}; raise it"
        )
    return chosen


def _split(documents: Sequence[Document], seed: int, fraction: float) -> dict[str, list[Document]]:
    """Assign each document by its own hash; where that leaves a split empty, move the document nearest to it."""
    ranks = {document.doc_id: _keyed_hash(b"split", seed, document.doc_id) for document in documents}
    held_out = {doc_id for doc_id, rank in ranks.items() if rank < fraction * 2**64}
    if len(held_out) == len(documents):
        held_out.remove(max(held_out, key=lambda doc_id: (ranks[doc_id], doc_id)))
    if fraction > 0 and not held_out and len(documents) > 1:
        held_out.add(min(ranks, key=lambda doc_id: (ranks[doc_id], doc_id)))
    return {
        "train": [document for document in documents if document.doc_id not in held_out],
        "validation": [document for document in documents if document.doc_id in held_out],
    }


def _write_split(
    out: Path,
    split: str,
    documents: Sequence[Document],
    record_batch_bytes: int,
    shard_bytes: int,
    bar: tqdm,
) -> tuple[ShardEntry, ...]:
    writer = ShardWriter(out, split, record_batch_bytes=record_batch_bytes, shard_bytes=shard_bytes)
    try:
        for document in documents:
            text = document.read()
            writer.add(document.doc_id, text)
            bar.update(len(text))
        return writer.finish()
    except BaseException:
        writer.abandon()
        _remove_temporary_files(out)
        raise


def _install(out: Path, manifest: Manifest, existing: Manifest | None) -> None:
    """Move finished shards into place, then the manifest, then remove what only the old manifest named."""
    replaceable = existing.file_names() if existing else set()
    for name in sorted(manifest.file_names() - replaceable):
        if (out / name).exists():
            _remove_temporary_files(out)
            raise DataError(
                f"{out / name}: is there already, and no manifest names it; move it away, or choose another --out"
            )
    write_manifest(out, manifest, _INSTALLING_NAME)
    for shards in manifest.splits.values():
        install(out, shards)
    os.replace(out / _INSTALLING_NAME, out / MANIFEST_NAME)
    for name in replaceable - manifest.file_names():
        (out / name).unlink(missing_ok=True)


def _remove_leftovers(out: Path, existing: Manifest | None) -> None:
    """Remove what an interrupted run left: temporary files, and shards that it had already renamed."""
    _remove_temporary_files(out)
    if (out / _INSTALLING_NAME).exists():
        kept = existing.file_names() if existing else set()
        for name in read_manifest(out, _INSTALLING_NAME).file_names() - kept:
            (out / name).unlink(missing_ok=True)
        (out / _INSTALLING_NAME).unlink()


def _remove_temporary_files(out: Path) -> None:
    for split in SPLITS:
        for pattern in (f"{split}-*.arrow{TEMPORARY_SUFFIX}", f"{split}-*.index.npy{TEMPORARY_SUFFIX}"):
            for path in out.glob(pattern):
                path.unlink()
    (out / f"{_INSTALLING_NAME}.partial").unlink(missing_ok=True)
