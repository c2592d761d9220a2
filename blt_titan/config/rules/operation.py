"""Rules on how a run is operated: schedule, profiling, exports, and what this machine can do. Each yields sentences."""

import importlib.util
from collections.abc import Iterator
from typing import Any

from blt_titan.config.rules.target import Target
from blt_titan.job_config import Data, Export, Failure, Heartbeat, Monitor
from blt_titan.titan import (
    Checkpoint,
    Comm,
    DataLoader,
    Float8Linear,
    LRScheduler,
    Metrics,
    Model,
    Profiling,
    Training,
)
from blt_titan.training.patience import others_wait_s


def schedule(lr_scheduler: LRScheduler, training: Training) -> Iterator[str]:
    """The learning rate is positive in every step."""
    total, steps = lr_scheduler.total_steps, training.steps
    if total is not None and total < steps:
        yield (
            f"lr_scheduler.total_steps = {total}: must be at least training.steps = {steps}, because the learning rate "
            "falls below zero after it"
        )


def profiling_cycle(profiling: Profiling) -> Iterator[str]:
    """A cycle of the profiler holds its phases."""
    together = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < together:
        yield (
            f"profiling.profile_freq = {profiling.profile_freq}: must be at least profiling.profiler_warmup + "
            f"profiling.profiler_active = {together}"
        )


def exports(export: Export, model: Model, checkpoint: Checkpoint) -> Iterator[str]:
    """Exports are made of a blt's checkpoints."""
    if not export.hf_every:
        return
    key = f"export.hf_every = {export.hf_every}"
    if model.name != "blt":
        yield f"{key} with model.name = {model.name!r}: only a blt"
    if not checkpoint.enable:
        yield f"{key} needs checkpoint.enable = true: checkpoints it reads"
    elif checkpoint.load_only:
        yield f"{key} with checkpoint.load_only = true: no checkpoint is written to export"


def skipping(failure: Failure, optimizer: Any, target: Target) -> Iterator[str]:
    """A bound on skipped steps can be reached, and no step of a GPU waits to hear whether it is skipped."""
    if failure.on_nonfinite == "skip" and target.device_type == "cuda" and optimizer.implementation != "fused":
        yield (
            f"optimizer.implementation = {optimizer.implementation!r} with failure.on_nonfinite = 'skip': must be "
            "'fused' on a GPU, whose kernel is told whether it skips; with others each step would wait for the GPU"
        )
    if failure.on_nonfinite == "skip" and failure.max_skipped >= failure.skip_window:
        yield (
            f"failure.max_skipped = {failure.max_skipped}: must be below failure.skip_window = {failure.skip_window}, "
            "or a run that skips every step never stops"
        )


def rollback(failure: Failure, checkpoint: Checkpoint, float8: Float8Linear) -> Iterator[str]:
    """A rollback finds a checkpoint."""
    if failure.on_spike != "rollback":
        return
    key = "failure.on_spike = 'rollback'"
    if not checkpoint.enable:
        yield f"{key} needs checkpoint.enable = true: to a checkpoint it goes back"
        return
    if checkpoint.load_only:
        yield f"{key} with checkpoint.load_only = true: no checkpoint is written to go back to"
    reach = (checkpoint.keep_latest_k - 1) * checkpoint.interval
    if checkpoint.keep_latest_k and reach < failure.rollback_steps:
        yield (
            f"failure.rollback_steps = {failure.rollback_steps} with checkpoint.keep_latest_k = "
            f"{checkpoint.keep_latest_k} and checkpoint.interval = {checkpoint.interval}: right after a save the "
            f"oldest checkpoint is {reach} steps old; keep more, or go back less far"
        )
    if float8.precompute_float8_dynamic_scale_for_fsdp:
        yield (
            f"{key} with quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp = true: the scales would be "
            "those of the weights that were given up; leave one out"
        )


def waits(heartbeat: Heartbeat, data: Data, comm: Comm, world_size: int) -> Iterator[str]:
    """Who is waited for is found out before a collective gives up and blames the rank that waits."""
    timeout = comm.train_timeout_seconds
    for key, value in (("heartbeat.limit_seconds", heartbeat.limit_seconds), ("data.wait_seconds", data.wait_seconds)):
        if world_size > 1 and value is not None and value >= timeout:
            yield (
                f"{key} = {value}: must be below comm.train_timeout_seconds = {timeout}, after which a collective "
                "gives up and names the rank that waits; raise that, or lower this"
            )
    fetch, others = data.fetch_timeout_s, others_wait_s(heartbeat, comm, world_size)
    if fetch is not None and others is not None and fetch >= others:
        is_set = heartbeat.limit_seconds is not None
        limit = "heartbeat.limit_seconds = " if is_set else ""
        why = "" if is_set else f" with comm.train_timeout_seconds = {timeout}"
        yield (
            f"data.fetch_timeout_s = {fetch:g}: must be below {limit}{others:g}{why}, after which ranks that wait end "
            "the run, without the store's error; raise that, or lower this"
        )


def on_a_cpu(checkpoint: Checkpoint, profiling: Profiling, training: Training, target: Target) -> Iterator[str]:
    """Some features need an accelerator."""
    if target.device_type != "cpu":
        return
    if checkpoint.async_mode == "async_with_pinned_mem":
        yield _not_on_a_cpu("checkpoint.async_mode = 'async_with_pinned_mem'", "it pins memory; use 'async'")
    if profiling.enable_profiling:
        yield _not_on_a_cpu("profiling.enable_profiling = true", "torchtitan's profiler needs an accelerator")
    if profiling.enable_memory_snapshot:
        yield _not_on_a_cpu("profiling.enable_memory_snapshot = true", "it records an accelerator's memory")
    if training.enable_cpu_offload:
        yield _not_on_a_cpu("training.enable_cpu_offload = true", "parameters are on the CPU already")


def predicted_memory(monitor: Monitor, target: Target) -> Iterator[str]:
    """A prediction of memory is compared with what an accelerator measures."""
    if monitor.predicted_memory_gib is not None and target.device_type == "cpu":
        yield _not_on_a_cpu(
            f"monitor.predicted_memory_gib = {monitor.predicted_memory_gib:g}", "nothing measures its tensors there"
        )


def _not_on_a_cpu(setting: str, why: str) -> str:
    return f"{setting} does not work on a CPU: {why}"


def page_locked(dataloader: DataLoader, target: Target) -> Iterator[str]:
    """Batches for a GPU are page-locked whatever a setting says, so none may say otherwise."""
    if target.device_type == "cuda" and not dataloader.pin_memory:
        yield (
            "training.dataloader.pin_memory = false: batches for a GPU are always page-locked, so that no copy is "
            "waited for; leave it out"
        )


def packages(metrics: Metrics) -> Iterator[str]:
    """What is asked for is installed."""
    if metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        yield "metrics.enable_wandb = true needs the package wandb: pip install wandb"
