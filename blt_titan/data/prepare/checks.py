"""What is looked at before a data set is prepared: the settings, where things lie, and what is there already."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blt_titan.data.prepare.destination import Destination
from blt_titan.data.prepare.file_systems import is_remote, local_name
from blt_titan.data.prepare.sources import Source
from blt_titan.data.prepare.work import least_worker_bytes
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import MANIFEST_NAME, Manifest
from blt_titan.data.store.shards import MAX_RECORD_BATCH_BYTES

# Far above any sensible value, and far below the 2 GiB where Arrow's 32-bit offsets end, even for one-byte documents.
MAX_SETTABLE_RECORD_BATCH_BYTES = 64 * 1024**2
_LEAST_HELD_BYTES = 64 * 1024**2


def check_settings(settings: Mapping[str, Any], workers: int, memory_bytes: int) -> None:
    """Raise `DataError` for a setting that is out of its bounds."""

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
    """Return the memory that each worker must be allowed, in bytes."""
    return least_worker_bytes(max_record_bytes) + _LEAST_HELD_BYTES


def check_out_lies_outside(target: Destination, folder: Path, sources: Sequence[Source]) -> None:
    """Raise `DataError` if what is written lies in a source."""
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


def check_same_settings(target: Destination, existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `DataError`, naming what differs, if the data set in `target` was made with other settings."""
    differing = [key for key in {**existing, **wanted} if existing.get(key) != wanted.get(key)]
    if differing:
        listed = ", ".join(f"{key} {existing.get(key)!r} there, {wanted.get(key)!r} now" for key in differing)
        raise DataError(
            f"{target}/{MANIFEST_NAME}: made with other settings ({listed}); choose another --out, or pass --overwrite"
        )


def check_intact(target: Destination, manifest: Manifest) -> None:
    """Raise `DataError` if files of the data set are missing or of another size."""
    try:
        target.check_intact(manifest)
    except DataError as error:
        raise DataError(f"{error} (with --overwrite)") from error
