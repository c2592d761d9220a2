"""Read the weights of a training checkpoint, of any layout, into a model on one device."""

import os
from pathlib import Path

import torch.nn as nn
from torch.distributed.checkpoint.state_dict_loader import load


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Return the last complete checkpoint `step-N` in a run's checkpoint folder.

    Raises:
        FileNotFoundError: if there is none; a half-written one has no `.metadata` and does not count.
    """
    complete = [
        path for path in Path(folder).glob("step-*") if path.name[5:].isdigit() and (path / ".metadata").is_file()
    ]
    if not complete:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint (step-N with a .metadata file)")
    return max(complete, key=lambda path: int(path.name[5:]))


def load_weights(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Fill every parameter of `model` from a DCP checkpoint; needs no process group.

    Raises:
        Exception: torch's own, if a parameter is missing or of another shape.
    """
    state = model.state_dict()
    load(state, checkpoint_id=str(checkpoint), no_dist=True)
    model.load_state_dict(state)
