r"""Show what a data set of byte shards holds, and check every byte of it.

    blt-titan inspect data/web
    blt-titan inspect s3://bucket/web --samples 10 --no-verify

Where it came from, counts, a few documents, entropies beside it; then the checksum of every record batch. The exit code
is 1 if anything is damaged, and every damaged shard is named.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from blt_titan.commands.arguments import Parser, directory_or_url, whole
from blt_titan.commands.ending import command
from blt_titan.data.prepare.destination import destination, fetch_shard
from blt_titan.data.prepare.sources import is_remote
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import MANIFEST_NAME, SPLITS, Manifest, ShardEntry, read_manifest
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import DIRECTORY, EntropySidecar
from blt_titan.progress import ProgressBar

SAMPLE_CHARACTERS = 160


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser("blt-titan inspect", __doc__)
    parser.add_argument(
        "data", type=directory_or_url, metavar="DIR", help="a directory or URL that `blt-titan prepare` wrote"
    )
    parser.add_argument(
        "--samples", type=whole(0, 10**6), default=3, metavar="N", help="documents to show (default %(default)s)"
    )
    parser.add_argument("--no-verify", action="store_true", help="read no text but the samples")
    parser.add_argument(
        "--json", action="store_true", help="print all that is said as one JSON object, without documents"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command("blt-titan inspect", DataError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, 1 if something is damaged, 2 if there is no data set."""
    args = parse_args(arguments)
    logging.basicConfig(format="blt-titan inspect: %(message)s")
    manifest = _manifest(args.data)
    if args.json:
        return _print_json(args, manifest)
    _describe(manifest)
    damaged = _show_samples(args.data, manifest, args.samples)
    if args.no_verify:
        return int(damaged)
    faults = list(_verify(args.data, manifest, progress=not args.no_progress))
    for fault in faults:
        print(f"damaged: {fault}", file=sys.stderr)
    if not faults:
        n_batches = sum(shard.record_batches for shards in manifest.splits.values() for shard in shards)
        print(f"\nchecked: {n_batches:,} record batches, {manifest.counts.text_bytes:,} bytes of text, all sound")
    return int(bool(faults) or damaged)


def _print_json(args: argparse.Namespace, manifest: Manifest) -> int:
    faults = None if args.no_verify else list(_verify(args.data, manifest, progress=not args.no_progress, quiet=True))
    said = {
        "data": args.data,
        "counts": asdict(manifest.counts),
        "splits": {
            split: {
                "documents": sum(shard.documents for shard in shards),
                "text_bytes": sum(shard.text_bytes for shard in shards),
                "record_batches": sum(shard.record_batches for shard in shards),
                "shards": len(shards),
            }
            for split, shards in manifest.splits.items()
        },
        "sources": [asdict(source) for source in manifest.sources],
        "settings": manifest.settings,
        "skipped": manifest.skipped,
        "verified": faults is not None,
        "damaged": faults or [],
    }
    print(json.dumps(said, indent=2))
    return int(bool(faults))


def _manifest(data: str) -> Manifest:
    if not is_remote(data):
        return read_manifest(data)
    manifest = destination(data).read_manifest()
    if manifest is None:
        raise DataError(f"{data}/{MANIFEST_NAME}: no such file, so {data} is not a finished data set")
    return manifest


def _describe(manifest: Manifest) -> None:
    print(f"{'source':<52}{'documents':>14}{'bytes':>20}{'empty':>8}{'binary':>8}{'skipped':>9}")
    for source in manifest.sources:
        print(
            f"{source.source:<52}{source.documents:>14,}{source.text_bytes:>20,}{source.empty_documents:>8,}"
            f"{source.binary_files:>8,}{source.skipped_records:>9,}"
        )
    print(f"\n{'split':<12}{'documents':>14}{'bytes':>20}{'mean bytes':>12}{'record batches':>16}{'shards':>8}")
    for split, shards in manifest.splits.items():
        documents, text_bytes = (sum(getattr(shard, key) for shard in shards) for key in ("documents", "text_bytes"))
        print(
            f"{split:<12}{documents:>14,}{text_bytes:>20,}{text_bytes / max(1, documents):>12,.0f}"
            f"{sum(shard.record_batches for shard in shards):>16,}{len(shards):>8,}"
        )
    if manifest.counts.documents_over_max_bytes:
        print(f"left out by max_bytes: {manifest.counts.documents_over_max_bytes:,} documents")
    print("settings: " + json.dumps({k: v for k, v in manifest.settings.items() if k != "sources"}))
    for message in manifest.skipped[:5]:
        print(f"skipped: {message}")


def _show_samples(data: str, manifest: Manifest, count: int) -> bool:
    """Show the first documents; tell whether they could not be read."""
    try:
        for split in SPLITS:
            if manifest.splits[split] and count > 0:
                with _one_shard(data, manifest, split, manifest.splits[split][0]) as shards:
                    batch = shards.read(0)
                for row in range(min(count, batch.rows)):
                    text = batch.document(row).tobytes()
                    print(f"\n{split} {batch.doc_ids[row]} ({len(text):,} bytes)")
                    print("    " + repr(text[:SAMPLE_CHARACTERS].decode(errors="backslashreplace")))
    except DataError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return True
    return False


def _verify(data: str, manifest: Manifest, *, progress: bool, quiet: bool = False) -> Iterator[str]:
    """Check every record batch of text and entropies; yield what is wrong with each shard that is damaged."""
    names = [] if is_remote(data) else sorted(path.name for path in Path(data, DIRECTORY).glob("*") if path.is_dir())
    for name in [] if quiet else names:
        print(f"\nentropies: {name}")
    with ProgressBar(
        total=manifest.counts.text_bytes, unit="B", unit_scale=True, desc="checking", disable=not progress
    ) as bar:
        for split in SPLITS:
            sidecars, faults = _sidecars(data, split, names) if manifest.splits[split] else ({}, [])
            yield from faults
            for entry in manifest.splits[split]:
                try:
                    with _one_shard(data, manifest, split, entry) as shards:
                        sound = set(sidecars)
                        for batch in shards:
                            bar.update(len(batch.text))
                            for name in sorted(sound):
                                try:
                                    sidecars[name](batch)
                                except DataError as error:
                                    sound.remove(name)
                                    yield str(error)
                except (DataError, OSError) as error:
                    yield str(error)


def _sidecars(data: str, split: str, names: Sequence[str]) -> tuple[dict[str, EntropySidecar], list[str]]:
    sidecars, faults = {}, []
    for name in names:
        try:
            sidecars[name] = EntropySidecar(data, name, ShardSet(data, split))
        except DataError as error:
            faults.append(str(error))
    return sidecars, faults


@contextmanager
def _one_shard(data: str, manifest: Manifest, split: str, entry: ShardEntry) -> Iterator[ShardSet]:
    """Open one shard alone, so that damage to another does not matter; one that is not here is copied first."""
    if not is_remote(data):
        yield ShardSet(data, split, only=entry.file, manifest=manifest)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch_shard(data, entry, Path(folder))
            yield ShardSet(folder, split, only=entry.file, manifest=manifest)
        except (DataError, OSError) as error:
            raise DataError(str(error).replace(folder, data.rstrip("/"))) from error
