"""Apply the parallelisms of a run to a model, in a fixed order.

Context, tensor, hash tables, activation checkpointing, compile, FSDP. The model comes on the meta device and leaves
sharded, still without weights; `init_weights` then draws them. What is not supported is refused before any device work
(`blt_titan/config/rules`).
"""

from dataclasses import replace
from typing import Any

import torch.nn as nn

from blt_titan.batch import halo_slices
from blt_titan.config.run_config import RunConfig
from blt_titan.model.placement import Placement
from blt_titan.titan import TORCH_DTYPE_MAP, Compile, ParallelDims, logger
from parallelisms.activation_checkpointing import checkpoint_global_blocks, checkpoint_local_blocks
from parallelisms.context import with_context_parallel
from parallelisms.float8 import uses_float8
from parallelisms.fsdp import apply_fsdp
from parallelisms.hash_tables import local_columns, shard_columns
from parallelisms.meshes import Meshes, build_meshes
from parallelisms.tensor import apply_tensor_parallel
from parallelisms.weights import write_shard


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: RunConfig) -> nn.Module:
    """Split `model` over the devices of a run without pipeline (torchtitan's `parallelize_fn`).

    Args:
        model: a BLT or an entropy model on the meta device.
        parallel_dims: the run's meshes.
        job_config: the run's settings.

    Returns:
        The same model, changed in place.
    """
    meshes = build_meshes(parallel_dims) if parallel_dims.world_size > 1 else None
    return parallelize_part(model, meshes, job_config)


def parallelize_part(model: Any, meshes: Meshes | None, job_config: RunConfig) -> nn.Module:
    """Split a model or a pipeline stage of one; `meshes` is None on a single device."""
    param_dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
    compile_model = compiles_model(job_config.compile)
    ignored = []
    placement = Placement(write_parameter=write_shard, local_columns=local_columns)
    if meshes is not None:
        if meshes.context.size() > 1:
            halo = run_halo_slices(job_config, model.args.local_window)
            placement = with_context_parallel(placement, meshes, halo_slices=halo)
        if meshes.tp.size() > 1:
            float8 = job_config.quantize.linear.float8
            # Emulation is for CPUs too, and gloo moves no float8.
            gathers_float8 = uses_float8(job_config.model) and float8.recipe_name is None and not float8.emulate
            apply_tensor_parallel(model, meshes.tp, float8_all_gather=gathers_float8)
        table = getattr(model, "hash_embedding", None)
        if table is not None and job_config.hash_embedding.sharding == "columns":
            look_up = shard_columns(table, meshes.bytes, compute_dtype=param_dtype)
            placement = replace(placement, look_up=look_up)
            ignored = [table.weight]
    if job_config.activation_checkpoint.mode != "none":
        checkpoint_global_blocks(
            model, job_config.activation_checkpoint, compiled=compile_model, dump_folder=job_config.job.dump_folder
        )
    if job_config.local_blocks.activation_checkpoint == "full":
        sliced = meshes is not None and meshes.context.size() > 1
        checkpoint_local_blocks(model, keep_received=compile_model and sliced)
    if compile_model:
        apply_compile(model, backend=job_config.compile.backend)
    if meshes is not None:
        pipelined = job_config.parallelism.pipeline_parallel_degree > 1
        reshard = job_config.parallelism.fsdp_reshard_after_forward
        apply_fsdp(
            model,
            patch_mesh=meshes.patches,
            byte_mesh=meshes.bytes,
            ignored=ignored,
            param_dtype=param_dtype,
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            reshard_after_forward=reshard == "always" or (reshard == "default" and not pipelined),
            cpu_offload=job_config.training.enable_cpu_offload,
        )
        logger.info(
            f"Sharded the global blocks over {_shape(meshes.patches)} and tp {meshes.tp.size()}, local modules over "
            f"{_shape(meshes.bytes)}, rows over {meshes.context.size()} slices"
        )
    model.placement = placement
    return model


def compiles_model(settings: Compile) -> bool:
    """Tell whether a run with these settings compiles its blocks."""
    return settings.enable and "model" in settings.components


def apply_compile(model: nn.Module, *, backend: str) -> None:
    """Compile blocks, cross-attentions and hashes on their own: one graph of each kind, no recompilation.

    What is left between them are embeddings, the decoder's norm and output, and the pooling of patches, of one kernel
    each. All blocks share one code object, of which Dynamo compiles at most eight variants
    (`torch._dynamo.config.recompile_limit`; one more is an error, by `fullgraph`). A run has four: local and global
    blocks, in training and in validation, each of one shape; checkpointed blocks have a code object of their own.
    `dynamic=False`, because Dynamo would take what differs between the two kinds, sizes of heads included, for
    symbols: kernels without aligned loads, and FlexAttention, whose scale is then a symbol, fails to compile.
    """
    parts = [part for name in ("encoder", "decoder") if (part := getattr(model, name, None)) is not None]
    stacks = [model.get_submodule("layers")]
    stacks += [part.get_submodule(name) for part in parts for name in ("layers", "cross_attention")]
    compiled = [module for stack in stacks for module in stack.children()]
    if (table := getattr(model, "hash_embedding", None)) is not None:
        compiled.append(table.hashes)
    for module in compiled:
        # In place: it keeps its name, and with it its parameters' names.
        module.compile(backend=backend, fullgraph=True, dynamic=False)


def run_halo_slices(job_config: RunConfig, window_bytes: int) -> int:
    """Return how many context slices back a byte's window can begin in this run, in its shorter kind of rows."""
    degree = job_config.parallelism.context_parallel_degree * job_config.parallelism.tensor_parallel_degree
    validation = job_config.validation
    seq_len = job_config.training.seq_len
    if validation.enable and validation.seq_len > 0:
        seq_len = min(seq_len, validation.seq_len)
    return halo_slices(
        window_bytes=window_bytes,
        slices=degree,
        segments_per_slice=seq_len // job_config.data.segment_bytes // degree,
        segment_bytes=job_config.data.segment_bytes,
        segment_patches=job_config.data.segment_patches,
        max_patch_bytes=job_config.patching.max_patch_bytes,
    )


def _shape(mesh: Any) -> dict[str, int]:
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
