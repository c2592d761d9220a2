"""Which model a run folder is of, by what lies in it: its settings, its checkpoints, its metrics.

No checkpoint is loaded for it, since that would unpickle: the names of parameters stand in its `.metadata` as they are.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

from blt_titan.checkpoint.steps import METADATA, complete_steps
from blt_titan.plots.metrics_file import RunMetrics, open_regular

SETTINGS = "config.toml"
BLT, ENTROPY = "blt", "blt_entropy"
_MOST_SETTINGS_BYTES, _MOST_METADATA_BYTES = 1 << 20, 1 << 26


class ModelName(NamedTuple):
    """As `model.name` in a run's settings."""

    name: str
    """Empty if nothing says so."""
    fault: str = ""
    """Why the settings could not be read."""


def model_name(run: Path, metrics: RunMetrics) -> ModelName:
    """Return which model a run trains.

    Args:
        run: its folder.
        metrics: what its metrics say; a model whose patches are all of one byte knows no patches.
    """
    fault = ""
    try:
        with open_regular(run / SETTINGS) as file:
            name = tomllib.loads(file.read(_MOST_SETTINGS_BYTES).decode())["model"]["name"]
        if isinstance(name, str) and name:
            return ModelName(name)
        fault = "model.name is not a name"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        fault = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    except (KeyError, TypeError):
        fault = "has no model.name"
    return ModelName(_of_checkpoints(run) or _of_metrics(metrics), fault)


def _of_checkpoints(run: Path) -> str:
    try:
        for step in complete_steps(run / "checkpoint").values():
            with open_regular(step / METADATA) as file:
                names = file.read(_MOST_METADATA_BYTES)
            if b"tok_embeddings.weight" in names:
                return BLT if b"encoder.tok_embeddings.weight" in names else ENTROPY
    except OSError:
        return ""  # gone by now, or not ours to read: the metrics have their say
    return ""


def _of_metrics(metrics: RunMetrics) -> str:
    match metrics.longest_mean_patch_bytes:
        case None:
            return ""
        case length:
            return ENTROPY if length == 1 else BLT
