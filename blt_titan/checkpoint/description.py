"""Read a training checkpoint, of any layout, into a model on one device: what model it is, and its weights.

Checkpoints may come from strangers: see `read.py`. A folder with a `config.json` is a Hugging Face
directory, never a checkpoint.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from blt_titan.checkpoint.json_fields import FieldError, parse_object, read_args, read_fields, read_rule, text
from blt_titan.checkpoint.read import CheckpointError, SafeLoadPlanner, SafeReader, brief, damage
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.sizes import BLTArgs, EntropyModelArgs
from blt_titan.patching.rule import PatchRule

logger = logging.getLogger(__name__)

MODEL_KEY = "train_state.model"
"""Where a checkpoint says what model it holds: JSON, `name` (as in TOML) and `args` (the fields of its arguments)."""
_KINDS: Mapping[str, type] = {"blt": BLTArgs, "blt_entropy": EntropyModelArgs}
_NOT_THE_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")

ModelT = TypeVar("ModelT", bound=nn.Module)


class NotDescribedError(CheckpointError):
    """A checkpoint that does not say what model it holds."""


class Description(NamedTuple):
    """What a checkpoint says of its model."""

    args: Any
    """BLTArgs or EntropyModelArgs."""
    rule: PatchRule | None
    """Where its patches begin, if it says."""
    entropies: str
    """The fingerprint of the entropy model that its training text was cut with, if it says."""


def complete_checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the checkpoints `step-N` in a folder by their step, ascending; a half-written one has no `.metadata`."""
    found = {
        int(path.name[5:]): path
        for path in Path(folder).glob("step-*")
        if path.name[5:].isdecimal() and _is_complete(path)
    }
    return dict(sorted(found.items()))


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Return the last checkpoint `step-N` in a run's checkpoint folder that is complete and sound; log which are not.

    Raises:
        FileNotFoundError: if there is no complete one.
        CheckpointError: if all are damaged.
    """
    complete = complete_checkpoints(folder)
    if not complete:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint (step-N with a .metadata file)")
    wrong = ""
    for path in reversed(complete.values()):
        if (found := damage(path)) is None:
            return path
        logger.warning(f"{path} is passed over: {found}")
        wrong = wrong or found
    raise CheckpointError(f"{folder}: none of its checkpoints is sound; the last: {wrong}")


def holds_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a checkpoint `step-N`, or a folder of a run that holds one, sound or not."""
    path = Path(path)
    return not _is_hf_directory(path) and (_is_complete(path) or _folder_of_checkpoints(path) is not None)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that a user means: `step-N` itself, or the last sound one of a run's folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    if _is_hf_directory(path):
        raise CheckpointError(
            f"{path}: is a model directory (it has a config.json), where a training checkpoint is wanted; "
            "`blt-titan import` makes one of it"
        )
    if _is_complete(path):
        if (found := damage(path)) is not None:
            raise CheckpointError(found)
        return path
    if (folder := _folder_of_checkpoints(path)) is not None:
        return latest_checkpoint(folder)
    raise CheckpointError(
        f"{path}: neither a complete checkpoint (a step-N folder with a .metadata file) nor a folder that holds one"
    )


def _folder_of_checkpoints(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "checkpoint") if complete_checkpoints(folder)), None)


def _is_complete(path: Path) -> bool:
    return (path / ".metadata").is_file() and not _is_hf_directory(path)


def _is_hf_directory(path: Path) -> bool:
    return os.path.lexists(path / "config.json")


def describe_model(checkpoint: Path) -> dict[str, Any]:
    """Return what model a checkpoint holds: `name`, `args`, and if it says so a BLT's `patching` and `entropies`.

    Raises:
        NotDescribedError: it does not say, as a checkpoint of weights alone does not.
        CheckpointError: it is damaged.
    """
    metadata = SafeReader(checkpoint).read_metadata()
    if not isinstance(metadata.state_dict_metadata.get(MODEL_KEY), BytesStorageMetadata):
        raise NotDescribedError(
            f"{checkpoint}: does not say what model it holds; checkpoints with optimizer and data state do "
            "(checkpoint.last_save_model_only = false)"
        )
    state = {MODEL_KEY: ""}
    fill_state(state, checkpoint)
    where = f"{checkpoint}: {MODEL_KEY}"
    if not isinstance(state[MODEL_KEY], str):
        raise CheckpointError(f"{where}: holds {type(state[MODEL_KEY]).__name__}, expected a text")
    try:
        described = parse_object(state[MODEL_KEY], where)
    except FieldError as error:
        raise CheckpointError(str(error)) from error
    read_description(described, where)
    return described


def read_description(described: Mapping[str, Any], where: str) -> Description:
    """Check and read what `describe_model` gives.

    Raises:
        CheckpointError: naming the field that is not what it should be.
    """
    try:
        found = read_fields(described, {"name": text(), "entropies": text("")}, f"{where}: ")
        if (kind := _KINDS.get(found["name"])) is None:
            raise FieldError(f"{where}: holds a model {found['name']!r}, not one of {', '.join(_KINDS)}")
        args = described.get("args")
        if not isinstance(args, Mapping):
            raise FieldError(f"{where}: args is no object")
        rule = read_rule(described["patching"], f"{where}: patching") if "patching" in described else None
        return Description(read_args(kind, args, f"{where}: args."), rule, found["entropies"])
    except FieldError as error:
        raise CheckpointError(str(error)) from error


def load_entropy_model(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> EntropyModel:
    """Build the entropy model of a checkpoint or of a run's last checkpoint, with its weights, in fp32.

    Raises:
        CheckpointError: there is no checkpoint, or it holds another kind of model.
    """
    checkpoint = find_checkpoint(path)
    described = describe_model(checkpoint)
    if described["name"] != "blt_entropy":
        raise CheckpointError(f"{checkpoint}: holds a model {described['name']!r}, not an entropy model (blt_entropy)")
    args = read_description(described, str(checkpoint)).args
    model = load_model(lambda: EntropyModel(args), checkpoint)
    return model.to(device).eval()


def load_model(build: Callable[[], ModelT], checkpoint: str | os.PathLike[str]) -> ModelT:
    """Build a model and fill it from a checkpoint; takes no memory before it is known that the shapes are those.

    Raises:
        CheckpointError: it is damaged, or its tensors are not exactly those of the model.
    """
    metadata = SafeReader(checkpoint).read_metadata()
    shapes = {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    model = build_meta(build)
    require_shapes(model, shapes, str(checkpoint))
    model = model.to_empty(device="cpu")
    load_weights(model, checkpoint)
    return model


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
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(_NOT_THE_MODEL)}
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
        error = next(iter(error.failures.values()))[0]
    return CheckpointError(f"{checkpoint}: cannot be read, or is of another model: {brief(error)}")
