"""Read checkpoints (DCP) that may come from strangers: nothing in them can run.

torch's own reader unpickles `.metadata`, and its planner unpickles whatever is no tensor: both run what they are told.
Here the former gives nothing but the few classes that metadata is made of, checked before anything is read by it, and
the latter nothing but plain data and arrays of numbers. What was written with digests is compared with them as it is
read (`digests.py`).

    load(state, checkpoint_id=path, storage_reader=SafeReader(path), planner=SafeLoadPlanner())
"""

import functools
import io
import logging
import math
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout, safe_globals

from blt_titan.checkpoint.digests import DIGEST_BYTES, new_digest, recorded, unsealed

logger = logging.getLogger(__name__)

_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        _MEM_FORMAT_ENCODING,
        _StorageInfo,
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    # Where it was saved; Python 3.13 calls the module otherwise.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}
_NEWER_ENTRIES = ("train_state.failure",)
"""What checkpoints of earlier versions lack, and a run begins anew."""


class CheckpointError(ValueError):
    """A checkpoint that is not what was asked for; the message names it and says what it is."""


class DamagedError(CheckpointError):
    """A file of a checkpoint does not hold what was written; the message names it."""


class _NumberType:
    """Stands for `numpy.dtype` in an entry: NumPy's own can say that numbers are pointers, and follows them."""

    def __init__(self, name: Any, *_: Any):
        if not isinstance(name, str) or not re.fullmatch(r"[biuf]\d{1,2}", name):
            raise ValueError("an array of something else than numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        # Version, byte order; then of structures, sizes and flags, of which plain numbers have none.
        if state not in tuple((3, order, None, None, None, -1, -1, 0) for order in "<|="):
            raise ValueError("an array of numbers of another byte order or kind")


class _Array:
    """Stands for `numpy.ndarray` in an entry; `numbers` is made of the bytes that are there, by their count."""

    numbers: np.ndarray

    def __init__(self) -> None:
        """Take no argument, so that no memory is named."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_column, raw = state
        if not isinstance(kind, _NumberType) or not isinstance(raw, bytes) or not isinstance(by_column, bool):
            raise ValueError("an array that is none")
        flat = np.frombuffer(raw, kind.dtype)
        self.numbers = flat.reshape(shape, order="F" if by_column else "C").copy()


def _new_array(kind: Any, *_: Any) -> _Array:
    if kind is not _Array:
        raise ValueError("an array of another class")
    return _Array()


def _plain(content: Any) -> Any:
    """Return what an entry holds with arrays in place of what stood for them."""
    if isinstance(content, _Array):
        return content.numbers
    if type(content) in (list, tuple):
        return type(content)(map(_plain, content))
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if content is None or isinstance(content, bool | int | float | str | bytes | torch.Tensor):
        return content
    raise ValueError(f"an object {type(content).__name__}")


_ENTRY_GLOBALS: list[Any] = [
    (_Array, "numpy.ndarray"),
    (_NumberType, "numpy.dtype"),
    # Before numpy 2 the module had another name.
    (_new_array, "numpy._core.multiarray._reconstruct"),
    (_new_array, "numpy.core.multiarray._reconstruct"),
    # To be asked for what they are when they are given a state.
    _Array,
    _NumberType,
]
"""What the loader's positions, an array, are made of."""


class SafeReader(FileSystemReader):
    """Reads a checkpoint whose metadata need not be trusted, and finds what is not as it was written."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._checked: set[tuple[str, int]] = set()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata.

        Raises:
            CheckpointError: naming the file, if it is missing or damaged, or holds what no metadata does.
        """
        rank = kwargs.get("rank")
        path = Path(self.path) / (".metadata" if rank is None else f"__{rank}.metadata")
        metadata, is_sealed = _unpickle(path)
        _check(path, metadata)
        has_digests = any(recorded(info) is not None for info in metadata.storage_data.values())
        if has_digests and not is_sealed:
            raise DamagedError(f"{path}: is damaged at its end, where its digest was; take another checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin to read; says of a checkpoint without digests that it has none, once."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        if is_coordinator and not any(recorded(info) is not None for info in self.storage_data.values()):
            _say_undigested(str(self.path))

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        digest, place = recorded(sinfo), (sinfo.relative_path, sinfo.offset)
        # An entry of which other slices are wanted too is compared once.
        if digest is None or place in self._checked:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        if new_digest(content).digest() != digest:
            names = [index.fqn for index, info in self.storage_data.items() if info is sinfo]
            raise DamagedError(f"{Path(self.path) / sinfo.relative_path}: {not_as_written(*names[:1], info=sinfo)}")
        self._checked.add(place)
        return io.BytesIO(content)


def not_as_written(name: str, *, info: _StorageInfo) -> str:
    """Say of an entry that its digest differs."""
    last = info.offset + info.length - 1
    return f"entry {name!r}, bytes {info.offset:,} to {last:,}, is not what was written, its digest differs"


@functools.cache
def _say_undigested(path: str) -> None:
    logger.info(f"{path} was written without digests: a changed number in it would not be found")


class SafeLoadPlanner(DefaultLoadPlanner):
    """Loads what is no tensor as plain data: numbers, texts, lists, dictionaries, arrays of numbers."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Begin; what the checkpoint is too old to have stays as it is."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for name in _NEWER_ENTRIES:
            if metadata is not None and name not in metadata.state_dict_metadata:
                self.state_dict.pop(name, None)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Set one entry of the state.

        Raises:
            CheckpointError: it is damaged, or holds anything else.
        """
        name = read_item.dest_index.fqn
        try:
            with safe_globals(_ENTRY_GLOBALS):
                content = _plain(torch.load(value, map_location="cpu", weights_only=True))
        # What damaged bytes raise is not documented, and is of many kinds.
        except Exception as error:
            raise CheckpointError(
                f"entry {name!r} is damaged, or holds other objects than plain data ({brief(error)})"
            ) from error
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (kind := _METADATA_CLASSES.get((module_name, global_name))) is not None:
            return kind
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint's metadata needs")


def _unpickle(path: Path) -> tuple[Any, bool]:
    """Return what a `.metadata` holds, and whether it has a seal, which holds."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); take another checkpoint") from error
    if not content:
        raise CheckpointError(f"{path}: is empty, the checkpoint is half written; take another checkpoint")
    try:
        content, is_sealed = unsealed(content)
    except ValueError as error:
        raise DamagedError(f"{path}: is damaged, {error}; take another checkpoint") from error
    # A pickle cannot call what it is not given, but it could set attributes of the classes that it is given.
    before = {kind: dict(vars(kind)) for kind in _METADATA_CLASSES.values() if isinstance(kind, type)}
    try:
        return _MetadataUnpickler(io.BytesIO(content)).load(), is_sealed
    # What damaged bytes raise is not documented, and is of many kinds.
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({brief(error)}); take another checkpoint") from error
    finally:
        for kind, attributes in before.items():
            for name in vars(kind).keys() - attributes.keys():
                delattr(kind, name)
            for name, value in attributes.items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)


def _check(path: Path, metadata: Any) -> None:
    """Check every type and number that reading relies on.

    Raises:
        CheckpointError: naming the entry.
    """

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: {what[:200]}; take another checkpoint")

    need(isinstance(metadata, Metadata), "is no checkpoint's metadata")
    fields: Mapping[str, Any] = vars(metadata)
    stored, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(stored, dict) or not isinstance(places, dict):
        raise CheckpointError(f"{path}: does not say what is stored, and where; take another checkpoint")
    need(isinstance(fields.get("storage_meta"), StorageMeta | None), "has a storage_meta of another kind")
    for name, entry in stored.items():
        need(isinstance(name, str), "names an entry by something else than a text")
        if isinstance(entry, BytesStorageMetadata):
            continue
        need(_is_tensor(entry), f"entry {name!r} is no tensor of a shape in chunks, nor bytes")
    chunk_bytes: dict[tuple[Any, Any], int] = {
        (name, chunk.offsets): math.prod(chunk.sizes) * entry.properties.dtype.itemsize
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }
    for index, info in places.items():
        key = (vars(index).get("fqn"), vars(index).get("offset")) if isinstance(index, MetadataIndex) else (None, None)
        need(isinstance(key[0], str) and key[0] in stored, "places an entry that it lacks")
        need(isinstance(key[1], torch.Size | None), f"entry {key[0]!r} begins at no place of its tensor")
        need(isinstance(info, _StorageInfo), f"entry {key[0]!r} has no place in a file")
        place = vars(info)
        file, length = place.get("relative_path"), place.get("length")
        need(
            isinstance(file, str) and file == PurePath(file).name and file not in ("", ".."),
            f"entry {key[0]!r} lies in {str(file)[:100]!r}, which is not a file of this folder",
        )
        need(_are_sizes((place.get("offset"), length)), f"entry {key[0]!r} lies nowhere in {file}")
        digest = recorded(info)
        need(
            digest is None or (isinstance(digest, bytes) and len(digest) == DIGEST_BYTES),
            f"entry {key[0]!r} has a digest that is none",
        )
        # What is compressed may be larger than its place; it is read into tensors whose size is known by then.
        if isinstance(length, int) and not place.get("transform_descriptors"):
            need(chunk_bytes.get(key, 0) <= length, f"entry {key[0]!r} is larger than its place in {file}")


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, TensorStorageMetadata):
        return False
    fields = vars(entry)
    size, chunks, properties = fields.get("size"), fields.get("chunks"), fields.get("properties")
    if not (isinstance(size, torch.Size) and isinstance(chunks, list) and isinstance(properties, TensorProperties)):
        return False
    if not isinstance(vars(properties).get("dtype"), torch.dtype):
        return False
    held = 0
    for chunk in chunks:
        if not isinstance(chunk, ChunkStorageMetadata):
            return False
        offsets, sizes = vars(chunk).get("offsets"), vars(chunk).get("sizes")
        if not (isinstance(offsets, torch.Size) and isinstance(sizes, torch.Size)):
            return False
        if not len(offsets) == len(sizes) == len(size) or not _are_sizes((*offsets, *sizes)):
            return False
        if any(offset + n > whole for offset, n, whole in zip(offsets, sizes, size, strict=True)):
            return False
        held += math.prod(sizes)
    return held >= math.prod(size)


def _are_sizes(numbers: Iterable[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 2**62 for number in numbers)


def brief(error: BaseException) -> str:
    """Say on one line what went wrong in a reader; torch would advise to load what it refused all the same."""
    text = " ".join(str(error).split())
    if "Weights only load failed" in text:
        named = re.search(r"GLOBAL ([\w.]+)", text)
        return f"it names {named[1]}, which is not loaded" if named else "it is no plain data"
    return text[:200] or type(error).__name__
