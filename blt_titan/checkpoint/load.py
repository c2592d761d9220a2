"""Read a training checkpoint, of any layout, into a model on one device: what model it is, and its weights.

Checkpoints may come from strangers: see `read.py`.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from blt_titan.checkpoint.description import MODEL_KEY, Description
from blt_titan.checkpoint.find import find_checkpoint
from blt_titan.checkpoint.read import CheckpointError, DamagedError, SafeLoadPlanner, SafeReader, brief
from blt_titan.checkpoint.verify import is_weight
from blt_titan.model.args import EntropyModelArgs
from blt_titan.model.entropy_model import EntropyModel

ModelT = TypeVar("ModelT", bound=nn.Module)


class NotDescribedError(CheckpointError):
    """A checkpoint that does not say what model it holds."""


def describe_model(checkpoint: Path) -> Description:
    """Return what model a checkpoint holds.

    Raises:
        NotDescribedError: it does not say, as a checkpoint of weights alone does not.
        CheckpointError: it is damaged, or of another version.
    """
    metadata = SafeReader(checkpoint).read_metadata()
    if not isinstance(metadata.state_dict_metadata.get(MODEL_KEY), BytesStorageMetadata):
        raise NotDescribedError(
            f"{checkpoint}: does not say what model it holds; checkpoints with optimizer and data state do "
            "(checkpoint.last_save_model_only = false)"
        )
    state = {MODEL_KEY: ""}
    fill_state(state, checkpoint)
    return Description.from_json(state[MODEL_KEY], f"{checkpoint}: {MODEL_KEY}")


def find_entropy_model(path: str | os.PathLike[str]) -> tuple[Path, EntropyModelArgs]:
    """Return the entropy model that a user names: its checkpoint, and its arguments; its weights are not read.

    Raises:
        CheckpointError: there is no checkpoint, it holds another kind of model, or tensors of other shapes.
    """
    checkpoint = find_checkpoint(path)
    described = describe_model(checkpoint)
    if described.name != "blt_entropy":
        raise CheckpointError(f"{checkpoint}: holds a model {described.name!r}, not an entropy model (blt_entropy)")
    _check_shapes(build_meta(lambda: EntropyModel(described.args)), checkpoint)
    return checkpoint, described.args


def load_entropy_model(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> EntropyModel:
    """Build the entropy model of a checkpoint or of a run's last checkpoint, with its weights, in fp32.

    Raises:
        CheckpointError: there is no checkpoint, or it holds another kind of model.
    """
    checkpoint, args = find_entropy_model(path)
    return load_model(lambda: EntropyModel(args), checkpoint).to(device).eval()


def load_model(build: Callable[[], ModelT], checkpoint: str | os.PathLike[str]) -> ModelT:
    """Build a model and fill it from a checkpoint; takes no memory before it is known that the shapes are those.

    Raises:
        CheckpointError: it is damaged, or its tensors are not exactly those of the model.
    """
    model = build_meta(build)
    _check_shapes(model, checkpoint)
    model = model.to_empty(device="cpu")
    load_weights(model, checkpoint)
    return model


def _check_shapes(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    metadata = SafeReader(checkpoint).read_metadata()
    shapes = {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    require_shapes(model, shapes, str(checkpoint))


def build_meta(build: Callable[[], ModelT]) -> ModelT:
    """Build a model that takes no memory."""
    with torch.device("meta"):
        return build()


def require_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each parameter of a model.

    Args:
        model: may be on the meta device.
        shapes: of the tensors that are there; beside them a checkpoint also holds the optimizer's and the data's.
        origin: of those, for the error.

    Raises:
        CheckpointError: the tensors are not exactly those of the model.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = {name: shape for name, shape in shapes.items() if is_weight(name)}
    missing, left_over = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or left_over:
        raise CheckpointError(f"{origin}: missing tensors {few(missing)}, left over {few(left_over)}")
    other = [f"{name} {shapes[name]}, not {expected[name]}" for name in expected if shapes[name] != expected[name]]
    if other:
        raise CheckpointError(f"{origin}: tensors of other shapes than the model's: {', '.join(other[:10])}")
    return expected


def few(names: list[str]) -> str:
    """Write a list of names, of a long one the beginning."""
    return f"[{', '.join(map(repr, names[:10]))}{f', and {len(names) - 10} more' if len(names) > 10 else ''}]"


def load_weights(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Fill every parameter of `model` from a DCP checkpoint; needs no process group.

    Raises:
        CheckpointError: it is damaged, or a parameter is missing or of another shape.
    """
    state = model.state_dict()
    fill_state(state, checkpoint)
    model.load_state_dict(state)


def fill_state(state: dict[str, Any], checkpoint: str | os.PathLike[str]) -> None:
    """Fill what a state names, tensors in place, from a DCP checkpoint; needs no process group.

    Raises:
        CheckpointError: it is damaged, or something is missing or of another shape.
    """
    reader = SafeReader(checkpoint)
    # torch would log what is wrong with it as a traceback, and look for other metadata.
    reader.read_metadata()
    with warnings.catch_warnings():
        # That no process group is needed is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(state, storage_reader=reader, planner=SafeLoadPlanner(), no_dist=True)
        # torch's own derives from BaseException; what damaged bytes raise in it is of many kinds.
        except (CheckpointException, Exception) as error:
            raise cannot_read(checkpoint, error) from error


def cannot_read(checkpoint: str | os.PathLike[str], error: BaseException) -> CheckpointError:
    """Say in a sentence why torch could not read a checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        causes = [cause for cause, _ in error.failures.values()]
        error = next((cause for cause in causes if isinstance(cause, DamagedError)), causes[0])
    if isinstance(error, DamagedError):
        return error
    return CheckpointError(f"{checkpoint}: cannot be read, or is of another model: {brief(error)}")
