"""Write a training checkpoint (DCP) of one model, from which a run of any layout begins (`initial_load_path`).

It holds weights in fp32 and what model they are, no optimizer and no data state.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan.checkpoint.description import MODEL_KEY, Description
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.storage_writer import DigestWriter
from blt_titan.patching.rule import PatchRule


def write_checkpoint(
    model: nn.Module,
    name: str,
    args: Any,
    out: str | os.PathLike[str],
    *,
    rule: PatchRule | None = None,
    entropies: str = "",
) -> Path:
    """Write a checkpoint of one model.

    Args:
        model: whole on one device.
        name: as `model.name` in a TOML, `blt` or `blt_entropy`.
        args: its arguments.
        out: the folder to write; must not be there.
        rule: where patches begin.
        entropies: the fingerprint of the entropy model that the training text was cut with, if that is known.

    Raises:
        FileExistsError: `out` is there.
        CheckpointError: it cannot be written.
    """
    out = require_free(out)
    described = Description(name, args, rule, entropies)
    state = {key: parameter.detach().float() for key, parameter in model.named_parameters()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            # That no process group is needed is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(state | {MODEL_KEY: described.to_json()}, storage_writer=DigestWriter(temporary), no_dist=True)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except CheckpointException as error:  # torch's own; derives from BaseException
        shutil.rmtree(temporary, ignore_errors=True)
        reason = " ".join(str(error).split())[-300:]
        raise CheckpointError(f"{out}: cannot be written: ... {reason}") from error
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def require_free(out: str | os.PathLike[str]) -> Path:
    """Return where a checkpoint is to be written.

    Raises:
        FileExistsError: it is there, and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: is there already; choose another folder")
    return out
