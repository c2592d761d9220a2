"""A run's settings: read strictly, and checked as a whole before any device work.

    python -m blt_titan.config.check --job.config_file train_configs/debug.toml

says what is wrong in one sentence, with exit code 2, or nothing. `run_train.sh` calls it before it starts ranks; the
world size is NGPU times NNODES. Precedence: command line > TOML > default.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blt_titan.titan  # noqa: F401

# isort: split
from torchtitan.tools.utils import device_type

from blt_titan.checkpoint.load import load_entropy_model
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.config.keys import refused_values, shown
from blt_titan.config.parallel import unsupported_settings
from blt_titan.config.read import RunConfigError, load_run_config
from blt_titan.config.resume import check_model, checkpoint_to_load, loads_weights_only, run_checkpoints, saved_position
from blt_titan.data.rows.continuation import check_continues
from blt_titan.data.rows.patcher import patch_decisions
from blt_titan.data.store.errors import DataError
from blt_titan.hf.config import HFConfigError, hf_config, why_not_by_itself
from blt_titan.hf.export import check_entropy_model, stored_weights
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.training.run_folder import RunFolderError, try_folder
from blt_titan.training.spec import (
    TRAIN_SPECS,
    dataset_paths,
    entropies_fingerprint,
    goes_by_entropy,
    open_shards,
    open_sidecars,
    patch_rule,
    stream_order,
)
from parallelisms.float8 import CONVERTER, uses_float8

__all__ = ["RunConfigError", "check_run", "load_run_config"]

_MOST_RANKS_NAMED = 4096


def check_run(config: Any, *, world_size: int, verify_data: bool, look_at_checkpoint: bool = True) -> None:
    """Check that the settings fit each other, the data and the number of ranks.

    Args:
        config: as `load_run_config` returns it.
        world_size: ranks of the whole job.
        verify_data: also read small data in full (`data.verify_bytes_at_start`); once per node is enough.
        look_at_checkpoint: also find the checkpoint that the run begins from, and whether it can; likewise.

    Raises:
        RunConfigError: naming the keys, their values and what is allowed.
        DataError: naming the file.
    """
    if refused := [*refused_values(config), *_settings_without_effect(config)]:
        raise RunConfigError("; ".join(refused))
    spec = TRAIN_SPECS[config.model.name]
    if config.model.flavor not in spec.model_args:
        raise RunConfigError(
            f"model.flavor = {config.model.flavor!r}: {config.model.name} has {', '.join(spec.model_args)}"
        )
    if config.checkpoint.create_seed_checkpoint:
        _check_seed_checkpoint(config, world_size)
    dp_replicate, dp_shard = _check_degrees(config, world_size)
    dp = dp_replicate * dp_shard
    _check_batch(config, dp)
    _check_rows(config)
    if refused := unsupported_settings(config, spec.model_args[config.model.flavor], dp_shard):
        raise RunConfigError("; ".join(refused))
    _check_schedule(config)
    _check_device(config)
    _check_imports(config)
    checkpoint = checkpoint_to_load(config) if look_at_checkpoint else None
    weights_only = checkpoint is not None and loads_weights_only(config, checkpoint)
    if checkpoint is not None:
        check_model(checkpoint, config, spec, weights_only=weights_only)
    _check_data(config, dp, verify_data)
    if checkpoint is not None and not weights_only and "dataloader" not in config.checkpoint.exclude_from_loading:
        _check_position(config, checkpoint, dp)
    _check_export(config, spec.model_args[config.model.flavor])


def _check_seed_checkpoint(config: Any, world_size: int) -> None:
    settings, key = config.checkpoint, "checkpoint.create_seed_checkpoint = true"
    if world_size > 1 or not settings.enable:
        raise RunConfigError(f"{key} needs one rank (NGPU=1) and checkpoint.enable = true")
    for name, default in (("load_only", False), ("initial_load_path", None), ("load_step", -1)):
        if (value := getattr(settings, name)) != default:
            raise RunConfigError(
                f"{key} with checkpoint.{name} = {shown(value)}: a seed checkpoint begins from nothing"
            )
    if (path := run_checkpoints(config) / "step-0").exists():
        raise RunConfigError(f"{key}: {path} is there already; remove it, or choose another job.dump_folder")


def _settings_without_effect(config: Any) -> Iterator[str]:
    """Yield a sentence for each key that another one makes useless."""
    loader, checkpoint, float8 = config.training.dataloader, config.checkpoint, config.quantize.linear.float8
    if loader.prefetch_factor is not None and loader.num_workers == 0:
        yield (
            f"training.dataloader.prefetch_factor = {loader.prefetch_factor} with training.dataloader.num_workers = 0: "
            "only workers make batches ahead; leave it out, or raise num_workers"
        )
    if checkpoint.export_dtype != "float32" and not checkpoint.last_save_model_only:
        yield (
            f"checkpoint.export_dtype = {checkpoint.export_dtype!r} needs checkpoint.last_save_model_only = true: a "
            "checkpoint that can be continued keeps its weights as they are"
        )
    if not checkpoint.initial_load_model_only and checkpoint.initial_load_path is None:
        yield "checkpoint.initial_load_model_only = false needs checkpoint.initial_load_path"
    recompute = config.activation_checkpoint
    if recompute.mode != "memory_budget":
        for name, default in (("memory_budget", 0.5), ("visualize_memory_budget_pareto", False)):
            if (value := getattr(recompute, name)) != default:
                yield (
                    f"activation_checkpoint.{name} = {shown(value)} needs activation_checkpoint.mode = 'memory_budget'"
                )
    if not uses_float8(config):
        for name, default in (
            ("recipe_name", None),
            ("enable_fsdp_float8_all_gather", False),
            ("precompute_float8_dynamic_scale_for_fsdp", False),
            ("emulate", False),
        ):
            if (value := getattr(float8, name)) != default:
                yield f"quantize.linear.float8.{name} = {shown(value)} needs model.converters = ['{CONVERTER}']"
    if config.model.name != "blt_entropy" and config.entropy_model.reset_at_newline:
        yield f"entropy_model.reset_at_newline = true with model.name = {config.model.name!r}: only blt_entropy has it"
    if config.model.name != "blt" and config.hash_embedding.sharding != "columns":
        yield (
            f"hash_embedding.sharding = {config.hash_embedding.sharding!r} with model.name = {config.model.name!r}: "
            "only blt has hash tables"
        )


def _check_schedule(config: Any) -> None:
    total, steps = config.lr_scheduler.total_steps, config.training.steps
    if total is not None and total < steps:
        raise RunConfigError(
            f"lr_scheduler.total_steps = {total}: must be at least training.steps = {steps}, because the learning rate "
            "falls below zero after it"
        )
    profiling = config.profiling
    together = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < together:
        raise RunConfigError(
            f"profiling.profile_freq = {profiling.profile_freq}: must be at least profiling.profiler_warmup + "
            f"profiling.profiler_active = {together}"
        )


def _check_imports(config: Any) -> None:
    """Import what the settings name, as the run will."""
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise RunConfigError("metrics.enable_wandb = true needs the package wandb: pip install wandb")
    if (name := config.experimental.custom_import) == "":
        return
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a module of the user's raises
        raise RunConfigError(
            f"experimental.custom_import = {name!r}: cannot be imported ({type(error).__name__}: {error})"
        ) from error


def _check_position(config: Any, checkpoint: Path, dp: int) -> None:
    """Check that the run's data can be read on from where a checkpoint is."""
    shards = open_shards(config, "train")
    order = stream_order(config, shards)
    patching = patch_decisions(patch_rule(config), entropies_fingerprint(config, shards))
    may_change = config.patching.allow_change
    try:
        saved, rows_served = saved_position(checkpoint)
        check_continues(saved, shards.fingerprint, order, patching, patching_may_change=may_change)
    except DataError as error:
        raise RunConfigError(f"{checkpoint}: {error}") from error
    if rows_served % dp:
        raise RunConfigError(
            f"parallelism: {dp} data-parallel ranks do not divide the {rows_served} rows that {checkpoint} has served; "
            "choose degrees whose product over replicas and shards does"
        )


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
        most = min(streams, _MOST_RANKS_NAMED)
        fitting = ", ".join(str(ranks) for ranks in range(1, most + 1) if streams % ranks == 0)
        raise RunConfigError(
            f"data.streams = {streams}: must be a multiple of {dp} data-parallel ranks; with as many streams there may "
            f"be {fitting} ranks, and a run keeps its streams"
        )


def _check_rows(config: Any) -> None:
    data, patching = config.data, config.patching
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.seq_len > 0:
        lengths["validation.seq_len"] = config.validation.seq_len
    for key, seq_len in lengths.items():
        if seq_len % data.segment_bytes:
            raise RunConfigError(
                f"{key} = {seq_len}: a row is a whole number of segments, so it must be a multiple of "
                f"data.segment_bytes = {data.segment_bytes}"
            )
    if patching.max_patch_bytes > data.segment_bytes:
        raise RunConfigError(
            f"patching.max_patch_bytes = {patching.max_patch_bytes}: must be 1 to data.segment_bytes = "
            f"{data.segment_bytes}, because a patch lies in one segment"
        )
    if (patching.rule == "static") != (patching.stride is not None):
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
                f"patching.rule = {patching.rule!r} {needs} patching.{key}, in nats; "
                "`blt-titan calibrate` prints the lines for your data"
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
    if config.checkpoint.load_only:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every} with checkpoint.load_only = true: no checkpoint is written to export"
        )
    key = "export" if export.entropy_checkpoint else "patching"
    checkpoint = export.entropy_checkpoint or config.patching.entropy_checkpoint
    entropy_args = _entropy_model(f"{key}.entropy_checkpoint", checkpoint).args if checkpoint else None
    rule = patch_rule(config)
    alone = why_not_by_itself(entropy_args, rule)
    if alone and not export.force:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every}, but transformers cannot cut texts for this model: {alone}. Set "
            "export.entropy_checkpoint if that is missing, or export.force = true to need explicit patch_lengths there"
        )
    if checkpoint and not alone:
        fingerprint = entropies_fingerprint(config, open_shards(config, "train"))
        assert fingerprint is not None  # else transformers could not cut texts for it
        try:
            check_entropy_model(fingerprint, stored_weights(checkpoint))
        except CheckpointError as error:
            raise RunConfigError(f"{key}.entropy_checkpoint = {checkpoint!r}: {error}") from error
    try:
        hf_config(model_args, None if alone else entropy_args, rule)
    except HFConfigError as error:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every}, which transformers cannot express: {error}"
        ) from error


def _entropy_model(key: str, checkpoint: str) -> EntropyModel:
    try:
        return load_entropy_model(checkpoint)
    except CheckpointError as error:
        raise RunConfigError(f"{key} = {checkpoint!r}: {error}") from error


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
        raise RunConfigError("training.dataset_path is not set: name a directory made by `blt-titan prepare`")
    for path in dataset_paths(config):
        if not Path(path).is_dir():
            key = f"data.mixture: {path!r}" if config.data.mixture else f"training.dataset_path = {path!r}"
            raise RunConfigError(f"{key}: no such directory; make it with blt-titan prepare")
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
        _entropy_model("patching.entropy_checkpoint", config.patching.entropy_checkpoint)
    if verify_data:
        for shards in [s for sets in [train, *held_out] for s in sets.sets]:
            if shards.text_bytes <= config.data.verify_bytes_at_start and config.data.on_damage == "stop":
                shards.verify_checksums()
            else:
                shards.verify_structure()


def main() -> None:
    """Check a run's settings and say what is wrong."""
    try:
        # Not WORLD_SIZE: some clusters set it to something else before torchrun does.
        world_size = _count_of("NGPU") * _count_of("NNODES")
        config = load_run_config(sys.argv[1:])
        check_run(config, world_size=world_size, verify_data=True)
        # On the node of rank 0, before ranks start: whether the folder can be had.
        if os.environ.get("NODE_RANK", "0") == "0":
            try_folder(config.job.dump_folder)
    except (RunConfigError, RunFolderError, DataError, CheckpointError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _count_of(variable: str) -> int:
    value = os.environ.get(variable, "1")
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:10]) <= 10**6):
        raise RunConfigError(f"{variable} = {value!r}: must be a whole number from 1 to 1000000")
    return int(value)


if __name__ == "__main__":
    main()
