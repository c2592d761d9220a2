"""The files of a model directory that others may have written: configurations and tensors, with nothing in them run.

Safetensors hold numbers alone. Of a `consolidated*.pth`, a pickle, nothing is loaded but tensors (`weights_only`).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from blt_titan.checkpoint.json_fields import read_object
from blt_titan.checkpoint.load import few
from blt_titan.checkpoint.read import brief
from blt_titan.hf.config import config_errors

_FLOATS = ("F32", "BF16", "F16", "F64")


class WeightFiles:
    """The tensors of a directory: safetensors, one file or several with an index, or `consolidated*.pth`."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        self._pickled: dict[str, torch.Tensor] = {}
        if index.is_file():
            self._file_of = _weight_map(index)
        elif (path := directory / "model.safetensors").is_file() or (
            path := directory / "consolidated.safetensors"
        ).is_file():
            with _opened(path) as file:
                self._file_of = dict.fromkeys(file.keys(), path.name)
        elif pickled := sorted(directory.glob("consolidated*.pth")):
            if len(pickled) > 1:
                raise FileNotFoundError(f"{directory}: several files of weights, {[p.name for p in pickled]}")
            self._pickled = _unpickled(pickled[0])
            self._file_of = dict.fromkeys(self._pickled, pickled[0].name)
        else:
            raise FileNotFoundError(
                f"{directory}: no weights: neither model.safetensors, nor an index of its parts, nor consolidated*.pth"
            )
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        files: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            files.setdefault(file, []).append(name)
        for file, names in files.items() if not self._pickled else ():
            if not (directory / file).is_file():
                raise FileNotFoundError(f"{directory / file} not found, which {index.name} names")
            with _opened(directory / file) as opened:
                held = set(opened.keys())
                if absent := sorted(set(names) - held):
                    raise ValueError(f"{directory / file}: missing tensors {absent}, which {index.name} puts there")
                for name in names:
                    part = opened.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise ValueError(
                            f"{directory / file}: {name[:100]} is {part.get_dtype()}, must be {' or '.join(_FLOATS)}"
                        )
                    self.shapes[name] = tuple(part.get_shape())

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        if self._pickled:
            return self._pickled[name]
        with _opened(self.directory / self._file_of[name]) as file:
            return file.get_tensor(name)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error}); fetch it again") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Return which file, beside the index, holds which tensor."""
    files = read_config(index).get("weight_map")
    if not isinstance(files, Mapping) or not files:
        raise ValueError(f"{index}: has no weight_map; fetch it again")
    for name, file in files.items():
        if not isinstance(file, str) or file != PurePath(file).name or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map puts {name[:100]} into {str(file)[:100]!r}, must be a .safetensors file beside it"
            )
    return dict(files)


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of `torch.save`, of which only tensors are taken."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # What damaged bytes raise is of many kinds.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({brief(error)}); fetch it again") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping):
            content = content.get(key, content)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise ValueError(f"{path}: {str(name)[:100]} is no tensor of floating-point numbers")
    # One number can stand for a tensor of any size.
    if (n_bytes := sum(tensor.nbytes for tensor in content.values())) > path.stat().st_size:
        raise ValueError(f"{path}: its tensors are {n_bytes:,} bytes, more than the file")
    return dict(content)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is of floating-point numbers in memory; sparse, nested and meta ones are not."""
    return (
        not tensor.is_nested
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
    )


def matched_parameters(
    model: nn.Module, translate: Callable[[str], str], tensors: WeightFiles, names: Iterable[str], but_for: str = ""
) -> dict[str, str]:
    """Return our parameters by the names of the tensors, once all are there, of the right shapes, and no other.

    Args:
        model: may be on the meta device.
        translate: our names into theirs.
        tensors: of the directory.
        names: theirs, those that are of this model.
        but_for: a parameter of ours that is another matter.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    expected = {translate(name): name for name, _ in model.named_parameters() if name != but_for}
    missing, left_over = sorted(expected.keys() - set(names)), sorted(set(names) - expected.keys())
    if missing or left_over:
        raise ValueError(f"{tensors.directory}: missing tensors {few(missing)}, left over {few(left_over)}")
    for their_name, name in expected.items():
        parameter, shape = model.get_parameter(name), tensors.shapes[their_name]
        if parameter.shape != shape:
            raise ValueError(
                f"{tensors.directory}: {their_name} is {shape}, the configuration makes it {tuple(parameter.shape)}"
            )
    return expected


def fill(model: nn.Module, matched: Mapping[str, str], tensors: WeightFiles) -> None:
    """Give a model memory, and its parameters what `matched_parameters` found for them."""
    model.to_empty(device="cpu")
    for their_name, name in matched.items():
        model.get_parameter(name).data.copy_(tensors.get(their_name))


def read_config(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a file of the configuration.

    Raises:
        FileNotFoundError: it is not there, and not optional.
        HFConfigError: it is no object of JSON.
    """
    if not path.is_file():
        if optional:
            return {}
        raise FileNotFoundError(f"{path} not found: not a model directory")
    with config_errors():
        return read_object(path)
