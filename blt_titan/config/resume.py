"""What a run begins from, and whether it can go on from there: looked at before any device work.

In: the settings. Out: the checkpoint that will be loaded, and for each thing that cannot change on resume a sentence
that names the key, what the checkpoint has and what the run says.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from blt_titan.checkpoint.description import MODEL_KEY, Description
from blt_titan.checkpoint.find import latest_checkpoint
from blt_titan.checkpoint.json_fields import FieldError, parse_object, read_object
from blt_titan.checkpoint.load import describe_model, fill_state
from blt_titan.checkpoint.read import CheckpointError, SafeReader
from blt_titan.checkpoint.rollback import read_rollback
from blt_titan.checkpoint.steps import complete_steps, is_complete, step_folder, step_folders, step_of
from blt_titan.checkpoint.verify import damage
from blt_titan.config.read import RunConfigError, settings_of
from blt_titan.config.rules.bounds import shown
from blt_titan.config.rules.keys import KEYS
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.continuation import IDENTITY_KEY, ROWS_KEY
from blt_titan.data.store.atomic_file import write_atomically

_KEYS_OF_ARGS = {"name": "model.name", "reset_at_newline": "entropy_model.reset_at_newline"}
"""What of a model is a setting of its own; the rest belongs to `model.flavor`."""
LOAD_STEP_NAME = "load_step.json"
"""In the folder of a run's checkpoints: the `checkpoint.load_step` that it went back to last."""
_RECORDED = (
    *(f"optimizer.{name}" for name in KEYS["optimizer"]),
    *(f"lr_scheduler.{name}" for name in KEYS["lr_scheduler"]),
    *(f"training.{name}" for name in ("steps", "max_norm", "global_batch_size", "seq_len", "dtype")),
)
"""Settings that may change when a run resumes, and are logged when they do."""


class RunStateError(RuntimeError):
    """A checkpoint that this run cannot continue from."""


def newest_sound(folder: str | Path, *, before: int | None = None) -> Path | None:
    """Return the newest checkpoint `step-N` that is whole; damaged ones are named in the log and passed over.

    Args:
        folder: of the run's checkpoints.
        before: the step that it shall be earlier than; None for any.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    try:
        return latest_checkpoint(folder, before=before)
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Restore it, remove {folder} to begin anew, or choose another job.dump_folder"
        ) from error


def checkpoint_to_load(config: RunConfig) -> Path | None:
    """Return the checkpoint that a run begins from; None if it begins from nothing.

    Raises:
        RunConfigError: the one that is asked for is not there, is damaged, or would be passed over.
        CheckpointError: there are checkpoints, but none is whole.
    """
    settings, folder = config.checkpoint, run_checkpoints(config)
    if not settings.enable:
        return None
    if (step := step_to_load(config)) >= 0:
        path, saved = step_folder(folder, step), step_folders(folder)
        steps = ", ".join(map(str, saved)) or "none"
        if step not in saved:
            raise RunConfigError(f"checkpoint.load_step = {step}: {folder} has no such step; it has {steps}")
        if fault := damage(path):
            raise RunConfigError(f"checkpoint.load_step = {step}: {fault}; the steps there are {steps}")
        return path
    newest = newest_sound(folder)
    if newest is not None or settings.initial_load_path is None:
        return newest
    begin_from = settings.initial_load_path
    if folder.exists():
        raise RunConfigError(
            f"checkpoint.initial_load_path = {begin_from!r} would be passed over, because {folder} is there, without a "
            "complete checkpoint: remove it"
        )
    path = Path(begin_from)
    if "://" in begin_from or not is_complete(path):
        raise RunConfigError(
            f"checkpoint.initial_load_path = {begin_from!r}: holds no complete checkpoint (a .metadata file); name a "
            "step-N folder here, or what `blt-titan import` wrote"
        )
    if fault := damage(path):
        raise RunConfigError(f"checkpoint.initial_load_path = {begin_from!r}: {fault}")
    return path


def step_to_load(config: RunConfig) -> int:
    """Return the step that a run is to begin from, -1 for the newest.

    It goes back to `checkpoint.load_step` once. A command that is started again with it, as a scheduler does, goes on
    from where the run is by now; what is there was made from that step.
    """
    settings, folder = config.checkpoint, run_checkpoints(config)
    if settings.load_step < 0 or settings.load_only or not complete_steps(folder):
        return settings.load_step
    try:
        went_back_to = read_object(folder / LOAD_STEP_NAME).get("load_step")
    except (OSError, FieldError):  # not there, or it says nothing
        went_back_to = None
    return -1 if went_back_to == settings.load_step else settings.load_step


def record_load_step(config: RunConfig) -> None:
    """Note that the run has gone back to `checkpoint.load_step`, if it was asked to.

    Raises:
        CheckpointError: it cannot be noted.
    """
    settings, path = config.checkpoint, run_checkpoints(config) / LOAD_STEP_NAME
    if settings.load_step < 0 or settings.load_only:
        return
    try:
        write_atomically(path, (json.dumps({"load_step": settings.load_step}) + "\n").encode())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}), so that checkpoint.load_step = {settings.load_step} would "
            "go back again at the next start; make room there"
        ) from error


def run_checkpoints(config: RunConfig) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(config.job.dump_folder) / config.checkpoint.folder


def loads_weights_only(config: RunConfig, checkpoint: Path) -> bool:
    """Tell whether of a checkpoint that a run begins from nothing but weights is loaded."""
    settings = config.checkpoint
    if checkpoint.parent == run_checkpoints(config):
        return step_of(checkpoint) == 0
    return settings.initial_load_model_only


def check_model(checkpoint: Path, config: RunConfig, spec: Any, *, weights_only: bool = False) -> None:
    """Check that a checkpoint is of the model that the run says.

    Args:
        checkpoint: `step-N`.
        config: the run's settings.
        spec: the model's registration, with its class and its flavors.
        weights_only: what is computed with the weights may be another thing than before.

    Raises:
        RunConfigError: naming the key, what the checkpoint has and what the run says.
        CheckpointError: it cannot be read.
    """
    metadata = SafeReader(checkpoint).read_metadata().state_dict_metadata
    args = spec.model_args[config.model.flavor]
    if isinstance(metadata.get(MODEL_KEY), BytesStorageMetadata):
        _check_description(describe_model(checkpoint), checkpoint, config, spec, weights_only)
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in spec.model_cls(args).named_parameters()}
    for name, shape in wanted.items():
        found = metadata.get(name)
        size = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
        if size != shape:
            has = "has no" if size is None else f"has {list(size)} for"
            raise RunConfigError(
                f"model.flavor = {config.model.flavor!r} of model.name = {config.model.name!r}: {checkpoint} {has} "
                f"{name}, this run {list(shape)}: it is of another model"
            )


def _check_description(saved: Description, checkpoint: Path, config: RunConfig, spec: Any, weights_only: bool) -> None:
    own = {flavor: _described(config, args) for flavor, args in spec.model_args.items()}
    found = saved.difference(own[config.model.flavor])
    if found is None or (weights_only and found.field != "name"):
        return
    key = _KEYS_OF_ARGS.get(found.field, "model.flavor")
    like = [flavor for flavor, description in own.items() if saved.difference(description) is None]
    meant = f" (it is model.flavor = {like[0]!r})" if like else ""
    raise RunConfigError(
        f"{key} = {shown(settings_of(config)[key])}: {checkpoint} {found}{meant}; set it as it was, or begin "
        "in another job.dump_folder"
    )


def _described(config: RunConfig, args: Any) -> Description:
    """Describe a run's model, with what its settings add to a flavor's arguments."""
    args = replace(args)
    args.update_from_config(config)
    return Description(config.model.name, args)


def saved_position(checkpoint: Path) -> tuple[dict[str, Any], int]:
    """Return what a checkpoint says of the data that its run reads, and how many rows all ranks are past.

    Raises:
        CheckpointError: it cannot be read, or holds weights alone.
    """
    if IDENTITY_KEY not in SafeReader(checkpoint).read_metadata().state_dict_metadata:
        raise CheckpointError(
            f"{checkpoint}: holds weights alone (checkpoint.last_save_model_only, or an import), so no run can go on "
            "from it; go back to an earlier step with checkpoint.load_step, or begin from it in another "
            "job.dump_folder with checkpoint.initial_load_path"
        )
    state: dict[str, Any] = {IDENTITY_KEY: "", ROWS_KEY: 0}
    fill_state(state, checkpoint)
    try:
        identity, rows_served = parse_object(state[IDENTITY_KEY], f"{checkpoint}: {IDENTITY_KEY}"), int(state[ROWS_KEY])
    except (FieldError, TypeError) as error:
        raise CheckpointError(str(error)) from error
    rollback = read_rollback(checkpoint)
    return identity, rows_served if rollback is None else rollback.rows_served


def recorded_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a checkpoint keeps, to tell what changed when its run resumes."""
    settings = settings_of(config)
    # JSON has no infinity, as training.max_norm may be.
    return {key: "inf" if settings[key] == math.inf else settings[key] for key in _RECORDED}


def changed_settings(saved: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each recorded setting that is another than in the checkpoint."""
    for key, value in recorded_settings(config).items():
        if key in saved and saved[key] != value:
            yield f"resumed with {key.removeprefix('optimizer.')} {value!r} (was {saved[key]!r})"
