"""A run's settings: read strictly, and checked as a whole before any device work.

    python -m blt_titan.run_config --job.config_file train_configs/debug.toml

says what is wrong in one sentence, with exit code 2, or nothing. `run_train.sh` calls it before it starts ranks; the
world size is NGPU times NNODES. Precedence: command line > TOML > default.
"""

import dataclasses
import difflib
import os
import sys
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import blt_titan.titan_device  # noqa: F401

# isort: split
from torchtitan.config import ConfigManager
from torchtitan.tools.utils import device_type

from blt_titan.data.entropies import fingerprint_of
from blt_titan.data.errors import DataError
from blt_titan.inference.checkpoint import CheckpointError, complete_checkpoints, load_entropy_model
from blt_titan.inference.entropies import OnlineEntropies
from blt_titan.inference.score_data import sidecar_settings
from blt_titan.interop.export import check_entropy_model, stored_weights
from blt_titan.interop.hf_config import HFConfigError, hf_config, why_not_by_itself
from blt_titan.train_spec import (
    TRAIN_SPECS,
    dataset_paths,
    goes_by_entropy,
    open_shards,
    open_sidecars,
    patch_rule,
    stream_order,
)
from parallelisms.support import unsupported_settings

CONFIG_MODULE = "blt_titan.job_config"


class RunConfigError(ValueError):
    """Settings that cannot be run; the message names the key, what it got and what it may be."""


def load_run_config(args: list[str]) -> Any:
    """Read the TOML that `--job.config_file` names, and overrides, into torchtitan's JobConfig with our sections.

    Args:
        args: command line without the program's name, `--section.key=value` (`--section.key value` but for booleans).

    Raises:
        RunConfigError: for a file that cannot be read, an unknown section or key, or a value of the wrong type.
        SystemExit: for an override of the wrong type; the option parser has then said why.
    """
    manager = ConfigManager()
    merged = manager._maybe_add_custom_config([f"--job.custom_config_module={CONFIG_MODULE}"], None)
    args = _check_overrides(args, merged)
    if path := _config_file(args):
        _check_table(_read_toml(path), merged, path, prefix="")
    return manager.parse_args([*args, f"--job.custom_config_module={CONFIG_MODULE}"])


def check_run(config: Any, *, world_size: int, verify_data: bool) -> None:
    """Check that the settings fit each other, the data and the number of ranks.

    Args:
        config: as `load_run_config` returns it.
        world_size: ranks of the whole job.
        verify_data: also read small data in full (`data.verify_bytes_at_start`); once per node is enough.

    Raises:
        RunConfigError: naming the keys, their values and what is allowed.
        DataError: naming the file.
    """
    spec = TRAIN_SPECS.get(config.model.name)
    if spec is None:
        raise RunConfigError(f"model.name = {config.model.name!r}: must be one of {', '.join(TRAIN_SPECS)}")
    if config.model.flavor not in spec.model_args:
        raise RunConfigError(
            f"model.flavor = {config.model.flavor!r}: {config.model.name} has {', '.join(spec.model_args)}"
        )
    _check_bounds(config)
    if config.checkpoint.create_seed_checkpoint and (world_size > 1 or not config.checkpoint.enable):
        raise RunConfigError(
            "checkpoint.create_seed_checkpoint = true needs one rank (NGPU=1) and checkpoint.enable = true"
        )
    dp_replicate, dp_shard = _check_degrees(config, world_size)
    dp = dp_replicate * dp_shard
    _check_batch(config, dp)
    _check_rows(config)
    if refused := unsupported_settings(config, spec.model_args[config.model.flavor], dp_shard):
        raise RunConfigError("; ".join(refused))
    _check_device(config)
    _check_data(config, dp, verify_data)
    _check_export(config, spec.model_args[config.model.flavor])


def _check_bounds(config: Any) -> None:
    at_least = {
        "training.steps": 1,
        "training.local_batch_size": 1,
        "metrics.log_freq": 1,
        "checkpoint.interval": 1,
        "validation.freq": 1,
        "data.streams": 1,
        "data.segment_bytes": 2,
        "data.segment_patches": 2,
        "export.hf_every": 0,
    }
    for key, bound in at_least.items():
        section, name = key.split(".")
        if (value := getattr(getattr(config, section), name)) < bound:
            raise RunConfigError(f"{key} = {value}: must be at least {bound}")
    for name in ("local_batch_size", "seq_len"):
        if (value := getattr(config.validation, name)) < 1 and value != -1:
            raise RunConfigError(f"validation.{name} = {value}: must be at least 1, or -1 for the training value")
    if config.checkpoint.keep_latest_k == 1 or config.checkpoint.keep_latest_k < 0:
        raise RunConfigError(
            f"checkpoint.keep_latest_k = {config.checkpoint.keep_latest_k}: must be 0 (keep all) or at least 2, "
            "because the last one may be half written"
        )
    begin_from = config.checkpoint.initial_load_path
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    begins = bool(begin_from) and config.checkpoint.enable and not complete_checkpoints(folder)
    if begins and folder.exists():
        raise RunConfigError(
            f"checkpoint.initial_load_path = {begin_from!r} would be passed over, because {folder} is there, without a "
            "complete checkpoint: remove it"
        )
    if begins and "://" not in begin_from and not (Path(begin_from) / ".metadata").is_file():
        raise RunConfigError(
            f"checkpoint.initial_load_path = {begin_from!r}: holds no complete checkpoint (a .metadata file); name a "
            "step-N folder, or what scripts.convert_from_hf wrote"
        )
    if config.training.global_batch_size == 0:
        raise RunConfigError("training.global_batch_size = 0: must be at least 1, or -1 for no accumulation")


def _check_degrees(config: Any, world_size: int) -> tuple[int, int]:
    """Check the degrees; return the replicating and the sharding data-parallel degree."""
    parallelism = config.parallelism
    degrees = {
        key: getattr(parallelism, key)
        for key in (
            "data_parallel_replicate_degree",
            "data_parallel_shard_degree",
            "context_parallel_degree",
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
        )
    }
    said = " x ".join(f"{key} {degree}" for key, degree in degrees.items())
    for key, degree in degrees.items():
        if degree < 1 and not (key == "data_parallel_shard_degree" and degree == -1):
            raise RunConfigError(f"parallelism.{key} = {degree}: must be at least 1")
    product = 1
    for degree in degrees.values():
        product *= degree
    if product < 0:
        if world_size % -product:
            raise RunConfigError(f"parallelism: {said} (-1 takes what is left) does not divide {world_size} ranks")
        degrees["data_parallel_shard_degree"] = world_size // -product
    elif product != world_size:
        raise RunConfigError(f"parallelism: {said} makes {product} ranks, but NGPU x NNODES gives {world_size}")
    return degrees["data_parallel_replicate_degree"], degrees["data_parallel_shard_degree"]


def _check_batch(config: Any, dp: int) -> None:
    training = config.training
    together = training.local_batch_size * dp
    if training.global_batch_size > 0 and training.global_batch_size % together:
        raise RunConfigError(
            f"training.global_batch_size = {training.global_batch_size}: must be a multiple of "
            f"training.local_batch_size = {training.local_batch_size} x {dp} data-parallel ranks = {together}"
        )
    if config.data.streams % dp:
        streams = config.data.streams
        fitting = ", ".join(str(ranks) for ranks in range(1, streams + 1) if streams % ranks == 0)
        raise RunConfigError(
            f"data.streams = {streams}: must be a multiple of {dp} data-parallel ranks; with as many streams there may "
            f"be {fitting} ranks, and a run keeps its streams"
        )


def _check_rows(config: Any) -> None:
    data, patching = config.data, config.patching
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.seq_len >= 0:
        lengths["validation.seq_len"] = config.validation.seq_len
    for key, seq_len in lengths.items():
        if seq_len < 1 or seq_len % data.segment_bytes:
            raise RunConfigError(
                f"{key} = {seq_len}: a row is a whole number of segments, so it must be a multiple of "
                f"data.segment_bytes = {data.segment_bytes}"
            )
    if not 1 <= patching.max_patch_bytes <= data.segment_bytes:
        raise RunConfigError(
            f"patching.max_patch_bytes = {patching.max_patch_bytes}: must be 1 to data.segment_bytes = "
            f"{data.segment_bytes}, because a patch lies in one segment"
        )
    if (patching.rule == "static") != (patching.stride is not None) or (patching.stride or 1) < 1:
        raise RunConfigError(
            f"patching.rule = {patching.rule!r} with patching.stride = {patching.stride}: 'static' needs a stride of "
            "at least 1 byte, the other rules take none"
        )
    _check_entropy_rule(config)


def _check_entropy_rule(config: Any) -> None:
    patching = config.patching
    for key, rules in (("threshold", ("global", "monotonic", "add")), ("threshold_add", ("add",))):
        if (patching.rule in rules) != (getattr(patching, key) is not None):
            needs = "needs" if patching.rule in rules else "takes no"
            raise RunConfigError(
                f"patching.rule = {patching.rule!r} {needs} patching.{key}, in nats; `python -m "
                "scripts.calibrate_threshold` prints the lines for your data"
            )
    if not goes_by_entropy(config):
        if patching.source == "online":
            raise RunConfigError(
                f"patching.source = 'online' with patching.rule = {patching.rule!r}, which asks for no entropies"
            )
        return
    if (patching.source == "online") != (patching.entropy_checkpoint is not None):
        raise RunConfigError(
            f"patching.source = {patching.source!r} with patching.entropy_checkpoint = "
            f"{patching.entropy_checkpoint!r}: 'online' needs a checkpoint of an entropy model, 'sidecar' takes none"
        )


def _check_export(config: Any, model_args: Any) -> None:
    export = config.export
    if not export.hf_every:
        return
    if config.model.name != "blt":
        raise RunConfigError(f"export.hf_every = {export.hf_every} with model.name = {config.model.name!r}: only a blt")
    if not config.checkpoint.enable:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every} needs checkpoint.enable = true: checkpoints it reads"
        )
    checkpoint = export.entropy_checkpoint or config.patching.entropy_checkpoint
    entropy_args = load_entropy_model(checkpoint).args if checkpoint else None
    rule = patch_rule(config)
    alone = why_not_by_itself(entropy_args, rule)
    if alone and not export.force:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every}, but transformers cannot cut texts for this model: {alone}. Set "
            "export.entropy_checkpoint if that is missing, or export.force = true to need explicit patch_lengths there"
        )
    if checkpoint and not alone:
        if config.patching.source == "sidecar":
            fingerprint = open_sidecars(config, open_shards(config, "train")).fingerprint
        else:
            scorer = load_entropy_model(config.patching.entropy_checkpoint)
            fingerprint = fingerprint_of(sidecar_settings(scorer, OnlineEntropies.storage, "float32"))
        try:
            check_entropy_model(fingerprint, stored_weights(checkpoint))
        except CheckpointError as error:
            raise RunConfigError(f"export.entropy_checkpoint = {export.entropy_checkpoint!r}: {error}") from error
    try:
        hf_config(model_args, None if alone else entropy_args, rule)
    except HFConfigError as error:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every}, which transformers cannot express: {error}"
        ) from error


def _check_device(config: Any) -> None:
    if device_type != "cpu":
        return
    for key, wanted, why in (
        ("checkpoint.async_mode", "async_with_pinned_mem", "it pins memory for an accelerator; use 'async'"),
        ("profiling.enable_profiling", True, "torchtitan's profiler needs an accelerator"),
        ("profiling.enable_memory_snapshot", True, "it records an accelerator's memory"),
        ("training.enable_cpu_offload", True, "parameters are on the CPU already"),
    ):
        section, name = key.split(".")
        if getattr(getattr(config, section), name) == wanted:
            raise RunConfigError(f"{key} = {wanted!r} does not work on a CPU: {why}")


def _check_data(config: Any, dp: int, verify_data: bool) -> None:
    if config.data.mixture and config.training.dataset_path is not None:
        raise RunConfigError(
            f"training.dataset_path = {config.training.dataset_path!r} with data.mixture of {len(config.data.mixture)} "
            "directories: set one of them"
        )
    if not config.data.mixture and config.training.dataset_path is None:
        raise RunConfigError("training.dataset_path is not set: name a directory made by scripts.prepare_data")
    for path in dataset_paths(config):
        if not Path(path).is_dir():
            key = f"data.mixture: {path!r}" if config.data.mixture else f"training.dataset_path = {path!r}"
            raise RunConfigError(f"{key}: no such directory; make it with python -m scripts.prepare_data")
    train = open_shards(config, "train")
    held_out = [open_shards(config, "validation")] if config.validation.enable else []
    stream_order(config, train)
    if len(train) < config.data.streams:
        raise RunConfigError(
            f"data.streams = {config.data.streams}: {', '.join(dataset_paths(config))} has only {len(train)} record "
            f"batches, and every stream needs one; set data.streams = {len(train) // dp * dp}, or prepare the data "
            "with smaller --record-batch-bytes"
        )
    if goes_by_entropy(config) and config.patching.source == "sidecar":
        for shards in [train, *held_out]:
            open_sidecars(config, shards)
    elif goes_by_entropy(config):
        load_entropy_model(config.patching.entropy_checkpoint)
    if verify_data:
        for shards in [s for sets in [train, *held_out] for s in sets.sets]:
            if shards.text_bytes <= config.data.verify_bytes_at_start and config.data.on_damage == "stop":
                shards.verify_checksums()
            else:
                shards.verify_structure()


def _config_file(args: list[str]) -> Path | None:
    for i, arg in enumerate(args):
        key, _, value = arg.partition("=")
        if key in ("--job.config_file", "--job.config-file"):
            return Path(value or args[i + 1])
    return None


def _check_overrides(args: list[str], cls: type) -> list[str]:
    """Check the names of overrides; write `--a.b=true` and `--a.b=false` as the option parser takes them."""
    checked = []
    for arg in args:
        name, _, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or "." not in name:
            checked.append(arg)
            continue
        *sections, key = name.replace("-", "_").split(".")
        hints, prefix = get_type_hints(cls), ""
        for part in (*sections, key):
            meant = part if part in hints else part.removeprefix("no_")
            if meant not in hints or (meant != part and hints[meant] is not bool):
                close = difflib.get_close_matches(part, hints, n=1)
                hint = f"; did you mean {prefix}{close[0]}?" if close else ""
                raise RunConfigError(f"{arg}: unknown key {prefix}{part}{hint}")
            prefix += f"{part}."
            hints = get_type_hints(hints[meant]) if dataclasses.is_dataclass(hints[meant]) else hints
        if hints.get(key) is bool and value in ("true", "false"):
            off = "" if value == "true" else "no-"
            arg = f"--{'.'.join(sections)}.{off}{key.replace('_', '-')}"
        checked.append(arg)
    return checked


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise RunConfigError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise RunConfigError(f"{path} is not valid TOML: {error}") from error


def _check_table(table: dict[str, Any], cls: type, path: Path, prefix: str) -> None:
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in table.items():
        name = prefix + key
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {prefix}{close[0]}? " if close else ""
            raise RunConfigError(f"{path}: unknown key {name}; {meant}Known here: {', '.join(known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise RunConfigError(f"{path}: {name} = {value!r} must be a table, [{name}]")
            _check_table(value, hint, path, prefix=f"{name}.")  # pyright: ignore[reportArgumentType]
        elif not _fits(value, hint):
            raise RunConfigError(f"{path}: {name} = {value!r} is of the wrong type, must be {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in options)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, options[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, options))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in options if option is not type(None))
    if origin is list:
        return f"a list of {_describe(options[0])}"
    if origin is dict:
        return f"a table of {_describe(options[1])}"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint) or str(hint)


def main() -> None:
    """Check a run's settings and say what is wrong."""
    # Not WORLD_SIZE: some clusters set it to something else before torchrun does.
    world_size = int(os.environ.get("NGPU", "1")) * int(os.environ.get("NNODES", "1"))
    try:
        check_run(load_run_config(sys.argv[1:]), world_size=world_size, verify_data=True)
    except (RunConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
