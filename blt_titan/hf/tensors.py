"""Tensors that need not fit into memory: read a few rows at a time, written as safetensors as they come.

    checkpoint of any layout  ->  StoredTensors.rows(name, 0, 1000)  ->  write_safetensors  ->  model.safetensors

The decision that is not obvious: a tensor of a checkpoint is not loaded but looked up. torch says where the numbers of
a saved tensor lie in its file (`torch.load` under FakeTensorMode), and those of some rows are read from there. So a
hash table of 12 GB passes through blocks of 32 MB, however few or many ranks wrote it.
"""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from blt_titan.checkpoint.load import fill_state
from blt_titan.checkpoint.read import CheckpointError, SafeReader, brief
from blt_titan.progress import ProgressBar

_BLOCK_BYTES = 32 * 1024**2
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NAMES_FILE = "model.safetensors.index.json"


class TensorSource(Protocol):
    """Named tensors, readable by rows (elements of their first dimension)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        ...

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return some rows of a tensor, on the CPU."""
        ...

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU."""
        ...


class NamedTensors:
    """Tensors by name, in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return some rows of a tensor, on the CPU."""
        return self._tensors[name][begin:end].cpu()

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU."""
        return self._tensors[name].cpu()


class ModuleTensors(NamedTensors):
    """The parameters of a module that is whole on one device."""

    def __init__(self, module: nn.Module):
        super().__init__(dict(module.named_parameters()))


class StoredTensors:
    """The tensors of a training checkpoint (DCP), whatever layout wrote it.

    Args:
        checkpoint: a folder `step-N`.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, checkpoint: str | os.PathLike[str]):
        self._folder = Path(checkpoint)
        metadata = SafeReader(checkpoint).read_metadata()
        self._storage: Any = metadata.storage_data
        self._tensors = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(stored.size) for name, stored in self._tensors.items()}
        self._layouts: dict[MetadataIndex, tuple[Path, int, torch.Tensor]] = {}

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return some rows of a tensor.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        stored = self._tensors[name]
        out = torch.empty(end - begin, *stored.size[1:], dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            first = chunk.offsets[0]
            low, high = max(begin, first), min(end, first + chunk.sizes[0])
            if low >= high:
                continue
            beside = tuple(
                slice(offset, offset + size) for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            )
            part = self._chunk_rows(MetadataIndex(name, chunk.offsets), chunk.sizes, low - first, high - first)
            out[(slice(low - begin, high - begin), *beside)] = part
        return out

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor as torch's own reader puts it together, which is another way than that of `rows`.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        stored = self._tensors[name]
        state = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
        fill_state(state, self._folder)
        return state[name]

    def _chunk_rows(self, index: MetadataIndex, sizes: torch.Size, begin: int, end: int) -> torch.Tensor:
        path, offset, layout = self._layout(index)
        if layout.shape != sizes:
            raise CheckpointError(
                f"{path}: {index.fqn} is {tuple(layout.shape)}, its metadata says {tuple(sizes)}; take another one"
            )
        row_bytes = layout.stride(0) * layout.element_size()
        # One row's elements may lie apart, but rows follow each other: a slice of columns is stored as its own tensor.
        last = sum((n - 1) * s for n, s in zip(layout.shape[1:], layout.stride()[1:], strict=True)) + 1
        n_bytes = (end - begin - 1) * row_bytes + last * layout.element_size()
        if n_bytes > self._storage[index].length:
            raise CheckpointError(f"{path}: {index.fqn} is larger than its place; take another checkpoint")
        content = bytearray(n_bytes)
        with open(path, "rb") as file:
            file.seek(offset + begin * row_bytes)
            if file.readinto(content) != n_bytes:
                raise CheckpointError(f"{path}: is cut short; take another checkpoint")
        flat = torch.frombuffer(content, dtype=layout.dtype)
        return flat.as_strided((end - begin, *layout.shape[1:]), layout.stride())

    def _layout(self, index: MetadataIndex) -> tuple[Path, int, torch.Tensor]:
        """Return a chunk's file, where its first element lies there, and a tensor without numbers of its layout."""
        if index not in self._layouts:
            info = self._storage.get(index)
            if info is None:
                raise CheckpointError(f"{self._folder}: {index.fqn} is in no file; take another checkpoint")
            path = self._folder / info.relative_path
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{path}: is compressed, which is not read here; save it without")
            try:
                with FakeTensorMode(), open(path, "rb") as file:
                    part: Any = _Part(file, info.offset, info.length)
                    layout = torch.load(part, map_location="cpu", weights_only=True)
                    if not isinstance(layout, torch.Tensor) or layout.layout is not torch.strided:
                        raise TypeError(f"{index.fqn} is no dense tensor")
            # What damaged bytes raise is of many kinds.
            except Exception as error:
                raise CheckpointError(f"{path}: cannot be read ({brief(error)}); take another checkpoint") from error
            place = layout.untyped_storage()._checkpoint_offset
            if place is None or layout.is_quantized:
                raise CheckpointError(f"{path}: {index.fqn} is stored in a way that is not read here")
            begin = place + layout.storage_offset() * layout.element_size()
            if layout.ndim and layout.stride(0) < math.prod(layout.shape[1:]):
                raise CheckpointError(f"{path}: {index.fqn} is stored by columns, which is not read here")
            self._layouts[index] = (path, info.offset + begin, layout)
        return self._layouts[index]


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.BufferedReader, begin: int, length: int):
        self._file, self._begin, self._length, self._place = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence] + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._place)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._place)])
        self._place += count
        return count


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]
    dtype: torch.dtype
    """One of `SAFETENSORS_DTYPES`."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor as it is written."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterable[torch.Tensor]:
        """Yield its rows, some at a time."""
        row_bytes = 4 * max(1, math.prod(self.shape[1:]))
        step = max(1, _BLOCK_BYTES // row_bytes)
        for begin in range(0, self.shape[0], step):
            yield self.rows(begin, min(begin + step, self.shape[0]))


def write_safetensors(
    folder: Path, entries: Sequence[Entry], *, max_shard_bytes: int, progress: bool = False
) -> list[str]:
    """Write tensors: `model.safetensors`, or numbered shards and their index, as `transformers` has them.

    Args:
        folder: exists.
        entries: what to write, in this order.
        max_shard_bytes: of a file; a larger tensor has one of its own.
        progress: show a progress bar.

    Returns:
        The names of the files of weights.
    """
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + entry.n_bytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.n_bytes
    total = sum(entry.n_bytes for entry in entries)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ProgressBar(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, bar)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _NAMES_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _write_shard(path: Path, entries: Sequence[Entry], bar: ProgressBar) -> None:
    # Wider numbers first, so that all are aligned.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.n_bytes
        header[entry.name] = {
            "dtype": SAFETENSORS_DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with open(path, "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for entry in entries:
            for block in entry.blocks():
                content = block.to(entry.dtype).contiguous().view(torch.uint8).numpy()
                file.write(np.ascontiguousarray(content).data)
                bar.update(content.nbytes)
        file.flush()
        os.fsync(file.fileno())
