"""What a run's parallelisms cannot do, found before any device work, each as one sentence that names the settings."""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import blt_titan.titan  # noqa: F401

# isort: split
from torchtitan.tools.utils import device_type, has_cuda_capability

from parallelisms.float8 import CONVERTER, uses_float8
from parallelisms.parallelize import compiles_model
from parallelisms.pipeline import SCHEDULES, SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES, n_stages

TENSOR, CONTEXT, PIPELINE = (f"parallelism.{axis}_parallel_degree" for axis in ("tensor", "context", "pipeline"))


def unsupported_settings(job_config: Any, model_args: Any, dp_shard: int) -> list[str]:
    """Return a sentence for each setting, or pair of settings, that is refused; empty if all is well.

    Args:
        job_config: the run's settings.
        model_args: sizes of the model.
        dp_shard: `parallelism.data_parallel_shard_degree`, or what -1 there comes to.
    """
    checks = (_check_features, _check_model, _check_context, _check_pipeline, _check_float8, _check_compile)
    return [sentence for check in checks for sentence in check(job_config, model_args, dp_shard)]


def _degrees(job_config: Any) -> tuple[int, int, int]:
    parallelism = job_config.parallelism
    return (
        parallelism.context_parallel_degree,
        parallelism.tensor_parallel_degree,
        parallelism.pipeline_parallel_degree,
    )


def _check_features(job_config: Any, model_args: Any, dp_shard: int) -> Iterator[str]:
    if job_config.activation_checkpoint.mode == "memory_budget" and not compiles_model(job_config):
        yield "activation_checkpoint.mode = 'memory_budget' needs compile.enable = true"
    if job_config.compile.enable and job_config.compile.components != ["model"]:
        yield f"compile.components = {job_config.compile.components}: only ['model'] is compiled; leave it out"


def _check_model(job_config: Any, model_args: Any, dp_shard: int) -> Iterator[str]:
    cp, tp, pp = _degrees(job_config)
    if job_config.model.name != "blt":
        for key, degree in ((CONTEXT, cp), (TENSOR, tp), (PIPELINE, pp)):
            if degree > 1:
                yield f"{key} = {degree} with model.name = {job_config.model.name!r}: only blt is split that way"
        if job_config.local_blocks.activation_checkpoint != "none":
            yield (
                f"local_blocks.activation_checkpoint = {job_config.local_blocks.activation_checkpoint!r} with "
                f"model.name = {job_config.model.name!r}: it has no local blocks; use activation_checkpoint.mode"
            )
        return
    for what, size in (("heads", model_args.global_heads), ("hidden features", model_args.global_ffn_hidden)):
        if size % tp:
            yield f"{TENSOR} = {tp} must divide the {size} {what} of the global blocks of model.flavor = " + repr(
                job_config.model.flavor
            )
    if job_config.hash_embedding.sharding == "columns":
        together = dp_shard * cp * tp
        if model_args.local_dim % together:
            yield (
                f"hash_embedding.sharding = 'columns' with dp_shard {dp_shard} x cp {cp} x tp {tp} = {together} ranks: "
                f"must divide the local width {model_args.local_dim} of model.flavor = {job_config.model.flavor!r}; "
                "raise parallelism.data_parallel_replicate_degree instead, or set 'fsdp'"
            )
        if job_config.training.enable_cpu_offload:
            yield "hash_embedding.sharding = 'columns' with training.enable_cpu_offload = true: set sharding = 'fsdp'"


def _check_context(job_config: Any, model_args: Any, dp_shard: int) -> Iterator[str]:
    cp, tp, _ = _degrees(job_config)
    for section in ("training", "validation") if job_config.validation.enable else ("training",):
        seq_len = getattr(job_config, section).seq_len
        segments = seq_len // job_config.data.segment_bytes
        if seq_len > 0 and segments % (cp * tp):
            yield (
                f"{section}.seq_len = {seq_len} / data.segment_bytes = {job_config.data.segment_bytes} makes "
                f"{segments} segments in a row, which {CONTEXT} = {cp} x {TENSOR} = {tp} must divide"
            )


def _check_pipeline(job_config: Any, model_args: Any, dp_shard: int) -> Iterator[str]:
    parallelism, training, validation = job_config.parallelism, job_config.training, job_config.validation
    pp = parallelism.pipeline_parallel_degree
    if pp == 1 or job_config.model.name != "blt":
        return
    if parallelism.fsdp_reshard_after_forward == "always":
        yield (
            f"parallelism.fsdp_reshard_after_forward = 'always' with {PIPELINE} = {pp}: split-backward schedules lose "
            "gradients then; use 'default' or 'never'"
        )
    name = parallelism.pipeline_parallel_schedule
    if name not in SCHEDULES:
        yield f"parallelism.pipeline_parallel_schedule = {name!r}: must be one of {', '.join(SCHEDULES)}"
        return
    if name in V_SCHEDULES and device_type == "cpu":
        yield f"parallelism.pipeline_parallel_schedule = {name!r} needs an accelerator: on gloo it sends to itself"
    stages, n_layers = n_stages(job_config, model_args.global_layers), model_args.global_layers
    said = f"parallelism.pipeline_parallel_schedule = {name!r} with {PIPELINE} = {pp}"
    if parallelism.pipeline_parallel_layers_per_stage:
        said += (
            f" and parallelism.pipeline_parallel_layers_per_stage = {parallelism.pipeline_parallel_layers_per_stage}"
        )
    per_rank, wanted = stages / pp, "two or more"
    fits = per_rank >= 2 and stages % pp == 0
    if name in ("GPipe", "1F1B"):
        fits, wanted = per_rank == 1, "one"
    elif name in V_SCHEDULES:
        fits, wanted = per_rank == 2, "two"
    if not fits:
        yield f"{said} makes {stages} stages: it needs {wanted} per rank"
    if stages - 2 > n_layers:
        yield f"{said} makes {stages} stages, too many for the {n_layers} global layers of the model"
    micro = parallelism.pipeline_parallel_microbatch_size
    if micro < 1 or training.local_batch_size % micro:
        yield (
            f"training.local_batch_size = {training.local_batch_size} must be a multiple of "
            f"parallelism.pipeline_parallel_microbatch_size = {micro}"
        )
    elif wanted := _wanted_micro_batches(name, training.local_batch_size // micro, pp):
        yield (
            f"{said}: training.local_batch_size = {training.local_batch_size} / "
            f"parallelism.pipeline_parallel_microbatch_size = {micro} makes {training.local_batch_size // micro} "
            f"micro-batches, {wanted}"
        )
    if validation.enable and validation.seq_len not in (-1, training.seq_len):
        yield (
            f"validation.seq_len = {validation.seq_len} with {PIPELINE} = {pp}: must be training.seq_len = "
            f"{training.seq_len}"
        )


def _wanted_micro_batches(schedule: str, micro_batches: int, pp: int) -> str | None:
    """Return what torch's schedule asks of the number of micro-batches, if it is not so."""
    least = {"1F1B": pp, "DualPipeV": 2 * pp}.get(schedule, 1)
    if micro_batches < least:
        return f"which must be at least {least}"
    rounds = max(1, micro_batches // pp)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and micro_batches % rounds:
        return f"which must be a multiple of {rounds}, the rounds over {pp} ranks; a multiple of {pp} is"
    return None


def _check_float8(job_config: Any, model_args: Any, dp_shard: int) -> Iterator[str]:
    if not uses_float8(job_config):
        return
    if job_config.model.name != "blt":
        yield f"model.converters = ['{CONVERTER}'] with model.name = {job_config.model.name!r}: only blt is converted"
    if importlib.util.find_spec("torchao") is None:
        yield f"model.converters = ['{CONVERTER}'] needs the package torchao: pip install 'blt_titan[float8]'"
    settings = job_config.quantize.linear.float8
    if settings.recipe_name is not None and settings.enable_fsdp_float8_all_gather:
        yield (
            f"quantize.linear.float8.recipe_name = {settings.recipe_name!r} with "
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true: only tensorwise scaling (no recipe) has it"
        )
    if settings.enable_fsdp_float8_all_gather and dp_shard * job_config.parallelism.context_parallel_degree == 1:
        yield (
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true with dp_shard x cp = 1: there is nothing to "
            "gather"
        )
    if settings.emulate and compiles_model(job_config):
        yield "quantize.linear.float8.emulate = true with compile.enable = true: emulation is for eager runs"
    if not settings.emulate and not has_cuda_capability(8, 9):
        yield (
            "quantize.linear.float8.emulate = false needs a GPU of compute capability 8.9 or later; emulate = true "
            "runs anywhere"
        )
    parallelism = job_config.parallelism
    if not settings.emulate and job_config.model.name == "blt":
        pipelined = parallelism.pipeline_parallel_degree > 1
        rows = parallelism.pipeline_parallel_microbatch_size if pipelined else job_config.training.local_batch_size
        segments = job_config.training.seq_len // job_config.data.segment_bytes
        patches = rows * segments * job_config.data.segment_patches // parallelism.context_parallel_degree
        if patches % 16:
            yield (
                f"float8 multiplies {patches} patch slots at once ({rows} rows of {segments} segments of "
                f"data.segment_patches = {job_config.data.segment_patches}, over {CONTEXT} = "
                f"{parallelism.context_parallel_degree}), which must be a multiple of 16"
            )
    tp = parallelism.tensor_parallel_degree
    width = (
        math.gcd(model_args.global_dim, model_args.global_ffn_hidden) // tp if job_config.model.name == "blt" else 16
    )
    if width % 16:
        yield f"{TENSOR} = {tp} with float8: widths of {width} per rank are not multiples of 16"


def _check_compile(job_config: Any, model_args: Any, dp_shard: int) -> Iterator[str]:
    if not compiles_model(job_config):
        return
    schedule = job_config.parallelism.pipeline_parallel_schedule
    if job_config.parallelism.pipeline_parallel_degree > 1 and schedule in SPLIT_BACKWARD_SCHEDULES:
        yield (
            f"compile.enable = true with parallelism.pipeline_parallel_schedule = {schedule!r}: torch cannot split the "
            "backward of compiled blocks; use 1F1B or Interleaved1F1B, or turn compile off"
        )
    cp, tp, _ = _degrees(job_config)
    checkpointing = job_config.activation_checkpoint
    if tp > 1 and checkpointing.mode == "memory_budget":
        yield (
            f"compile.enable = true with {TENSOR} = {tp} and activation_checkpoint.mode = 'memory_budget': torch "
            "cannot weigh what tensor-parallel blocks keep; use another mode"
        )
    backend = model_args.attention_backend
    if tp == 1 or backend == "flex" or (backend == "auto" and device_type == "cuda"):
        return
    # torch sorts the random state that it keeps for such an SDPA, dropout or not, behind the tensor-parallel mesh.
    why = "torch cannot compile an SDPA that backward computes again, and FlexAttention needs a GPU"
    if cp > 1:
        yield f"compile.enable = true with {TENSOR} = {tp} and {CONTEXT} = {cp}: {why}; turn compile off"
    elif checkpointing.mode == "full" or (
        checkpointing.mode == "selective" and checkpointing.selective_ac_option != "op"
    ):
        yield (
            f"compile.enable = true with {TENSOR} = {tp} and activation_checkpoint.mode = {checkpointing.mode!r}: "
            f"{why}; use mode 'none' or 'selective' with selective_ac_option = 'op', or turn compile off"
        )
