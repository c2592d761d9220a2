"""Read a training checkpoint, of any layout, into a model on one device: what model it is, and its weights."""

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.sizes import EntropyModelArgs

MODEL_KEY = "train_state.model"
"""Where a checkpoint says what model it holds: JSON, `name` (as in TOML) and `args` (the fields of its arguments)."""


class CheckpointError(ValueError):
    """A checkpoint that is not what was asked for; the message names it and says what it is."""


def complete_checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the checkpoints `step-N` in a folder by their step, ascending; a half-written one has no `.metadata`."""
    found = {
        int(path.name[5:]): path
        for path in Path(folder).glob("step-*")
        if path.name[5:].isdigit() and (path / ".metadata").is_file()
    }
    return dict(sorted(found.items()))


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Return the last complete checkpoint `step-N` in a run's checkpoint folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    complete = complete_checkpoints(folder)
    if not complete:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint (step-N with a .metadata file)")
    return list(complete.values())[-1]


def load_weights(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Fill every parameter of `model` from a DCP checkpoint; needs no process group.

    Raises:
        CheckpointError: it is damaged, or a parameter is missing or of another shape.
    """
    state = model.state_dict()
    fill_state(state, checkpoint)
    model.load_state_dict(state)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that a user means: `step-N` itself, or the last one of a run's folder or checkpoint folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        return path
    for folder in (path, path / "checkpoint"):
        if any(folder.glob("step-*/.metadata")):
            return latest_checkpoint(folder)
    raise CheckpointError(
        f"{path}: neither a complete checkpoint (a step-N folder with a .metadata file) nor a folder that holds one"
    )


def describe_model(checkpoint: Path) -> dict[str, Any]:
    """Return what model a checkpoint holds: `name` and `args`.

    Raises:
        CheckpointError: it does not say, as a checkpoint of weights alone does not.
    """
    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint}/.metadata: cannot be read ({error}); take another checkpoint") from error
    if not isinstance(metadata.state_dict_metadata.get(MODEL_KEY), BytesStorageMetadata):
        raise CheckpointError(
            f"{checkpoint}: does not say what model it holds; checkpoints with optimizer and data state do "
            "(checkpoint.last_save_model_only = false)"
        )
    state = {MODEL_KEY: ""}
    fill_state(state, checkpoint)
    return json.loads(state[MODEL_KEY])


def load_entropy_model(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> EntropyModel:
    """Build the entropy model of a checkpoint or of a run's last checkpoint, with its weights, in fp32.

    Raises:
        CheckpointError: there is no checkpoint, or it holds another kind of model.
    """
    checkpoint = find_checkpoint(path)
    described = describe_model(checkpoint)
    if described["name"] != "blt_entropy":
        raise CheckpointError(f"{checkpoint}: holds a model {described['name']!r}, not an entropy model (blt_entropy)")
    model = EntropyModel(EntropyModelArgs(**described["args"]))
    load_weights(model, checkpoint)
    return model.to(device).eval()


def fill_state(state: dict[str, Any], checkpoint: str | os.PathLike[str]) -> None:
    """Fill what a state names, tensors in place, from a DCP checkpoint; needs no process group.

    Raises:
        CheckpointError: it is damaged, or something is missing or of another shape.
    """
    with warnings.catch_warnings():
        # That no process group is needed is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(state, checkpoint_id=str(checkpoint), no_dist=True)
        # torch's own derives from BaseException.
        except (CheckpointException, OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[-300:]
            raise CheckpointError(f"{checkpoint}: cannot be read, or is of another model: ... {reason}") from error
