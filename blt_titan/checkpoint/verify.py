"""What is wrong with the files of a checkpoint: by a look that reads no tensor, or by every byte."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from blt_titan.checkpoint.digests import digest_of_range, recorded
from blt_titan.checkpoint.read import CheckpointError, SafeReader, not_as_written

_ENTRY_BEGINS, _ENTRY_ENDS, _END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
"""Bytes of each entry of a file, an archive of `torch.save`."""
_MOST_LOOKS = 10_000
"""Entries whose ends a look compares: it may not take long."""
_NOT_THE_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")

_Entry = tuple[str, _StorageInfo]


def is_weight(name: str) -> bool:
    """Tell whether an entry is of the model, and not of the optimizer, the schedule or the data."""
    return not name.startswith(_NOT_THE_MODEL)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint `step-N`, as one sentence that names the file; None if it looks sound.

    Reads the metadata, what is no tensor, and the ends of tensors: finds what a killed machine leaves, files that are
    missing, cut short or filled with zeros, but not a changed number of a tensor.
    """
    return next(faults(checkpoint), None)


def damaged_weights(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, as `damage` does; reads every byte of the weights."""
    return next(faults(checkpoint, reads=is_weight), None)


def faults(
    checkpoint: Path,
    *,
    reads: Callable[[str], bool] = lambda name: False,
    on_bytes: Callable[[int], Any] = lambda count: None,
) -> Iterator[str]:
    """Yield a sentence for each damaged file of a checkpoint, which it begins with.

    Args:
        checkpoint: the folder `step-N`.
        reads: of the name of an entry, whether every byte of it is compared with its digest; of others, what is no
            tensor is, and of tensors the ends are looked at. Without digests the ends alone can be looked at.
        on_bytes: told how many bytes were compared, as they are.
    """
    try:
        metadata = SafeReader(checkpoint).read_metadata()
    except CheckpointError as error:
        yield str(error)
        return
    compared = {
        name
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, BytesStorageMetadata) or reads(name)
    }
    for name, entries in entries_of_files(metadata).items():
        path = Path(checkpoint) / name
        try:
            with open(path, "rb") as file:
                fault = _fault(file, entries, compared, on_bytes)
        except OSError as error:
            fault = f"cannot be read ({error.strerror or error})"
        if fault is not None:
            yield f"{path}: {fault}"


def entries_of_files(metadata: Metadata) -> dict[str, list[_Entry]]:
    """Return the entries of each file, by its name, in the order in which they lie there."""
    found: dict[str, list[_Entry]] = {}
    for index, info in metadata.storage_data.items():
        found.setdefault(info.relative_path, []).append((index.fqn, info))
    return {name: sorted(found[name], key=lambda entry: entry[1].offset) for name in sorted(found)}


def _fault(
    file: io.BufferedReader, entries: Sequence[_Entry], compared: set[str], on_bytes: Callable[[int], Any]
) -> str | None:
    size, end = os.fstat(file.fileno()).st_size, max(info.offset + info.length for _, info in entries)
    if size < end:
        return f"is cut short, {size} bytes of at least {end}"
    if size > end and all(recorded(info) is not None for _, info in entries):
        return f"has {size} bytes, but {end} were written"
    every = max(1, len(entries) // _MOST_LOOKS)
    for number, (name, info) in enumerate(entries):
        digest = recorded(info)
        if digest is not None and name in compared:
            if digest_of_range(file, info.offset, info.length, on_bytes) != digest:
                return not_as_written(name, info=info)
        elif (number % every == 0 or number == len(entries) - 1) and not (
            info.transform_descriptors or _is_archive(file, info)
        ):
            return f"is damaged at byte {info.offset} (zeros, or other bytes)"
    return None


def _is_archive(file: io.BufferedReader, info: _StorageInfo) -> bool:
    begin = os.pread(file.fileno(), len(_ENTRY_BEGINS), info.offset)
    end = os.pread(file.fileno(), len(_ENTRY_ENDS), max(0, info.offset + info.length - _END_BYTES))
    return (begin, end) == (_ENTRY_BEGINS, _ENTRY_ENDS)
