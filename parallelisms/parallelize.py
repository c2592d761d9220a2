"""Apply the parallelisms of a run to a model, in a fixed order: activation checkpointing, compile, FSDP.

The model comes on the meta device and leaves sharded, still without weights; `init_weights` then draws them. What is
not supported is refused by `unsupported_settings` before any device work.
"""

import torch
import torch.nn as nn
from torch._higher_order_ops import flex_attention
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import blt_titan.titan_device  # noqa: F401

# isort: split
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from parallelisms.fsdp import apply_fsdp
from parallelisms.weights import write_shard

_OPS_TO_SAVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    flex_attention,
}
"""Results that selective activation checkpointing keeps, because they cost most to compute again."""


def unsupported_settings(job_config: JobConfig) -> list[str]:
    """Return a sentence for each setting that this version refuses; empty if all is well."""
    parallelism = job_config.parallelism
    refused = [
        f"parallelism.{key} = {degree}: only 1 is supported in this version"
        for key in (
            "tensor_parallel_degree",
            "context_parallel_degree",
            "pipeline_parallel_degree",
            "expert_parallel_degree",
        )
        if (degree := getattr(parallelism, key)) != 1
    ]
    if job_config.model.converters:
        refused.append(f"model.converters = {job_config.model.converters}: no converter is supported in this version")
    if job_config.activation_checkpoint.mode == "memory_budget" and not job_config.compile.enable:
        refused.append("activation_checkpoint.mode = 'memory_budget' needs compile.enable = true")
    if job_config.fault_tolerance.enable:
        refused.append("fault_tolerance.enable = true is not supported")
    if job_config.comm.mode != "default":
        refused.append(f"comm.mode = {job_config.comm.mode!r}: only 'default' is supported in this version")
    return refused


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Split `model` over the devices of a run (torchtitan's `parallelize_fn`).

    Args:
        model: a BLT or an entropy model on the meta device.
        parallel_dims: the run's meshes.
        job_config: the run's settings.

    Returns:
        The same model, changed in place.
    """
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compile_model,
            op_sac_save_list=_OPS_TO_SAVE,  # pyright: ignore[reportArgumentType]
            base_folder=job_config.job.dump_folder,
        )
    if compile_model:
        apply_compile(model, backend=job_config.compile.backend)
    if parallel_dims.fsdp_enabled or parallel_dims.dp_replicate_enabled:
        mesh = _data_parallel_mesh(parallel_dims)
        reshard = {"always": True, "default": True, "never": False}[job_config.parallelism.fsdp_reshard_after_forward]
        apply_fsdp(
            model,
            mesh,
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            reshard_after_forward=reshard,
            cpu_offload=job_config.training.enable_cpu_offload,
        )
        logger.info(f"Sharded the model over {dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))}")
    setattr(model, "write_parameter", write_shard)  # noqa: B010  (a function, which pyright takes for a submodule)
    return model


def apply_compile(model: nn.Module, *, backend: str) -> None:
    """Compile each transformer block on its own, global and local: one graph per kind of block, no recompilation."""
    stacks = [model.get_submodule("layers")]
    stacks += [model.get_submodule(f"{part}.layers") for part in ("encoder", "decoder") if hasattr(model, part)]
    for stack in stacks:
        for block in stack.children():
            # In place: the block keeps its name, and with it its parameters' names.
            block.compile(backend=backend, fullgraph=True)


def _data_parallel_mesh(parallel_dims: ParallelDims) -> DeviceMesh:
    if not parallel_dims.dp_replicate_enabled:
        return parallel_dims.get_mesh("fsdp")
    if parallel_dims.fsdp_enabled:
        return parallel_dims.get_mesh(["dp_replicate", "fsdp"])
    # Replicas alone are HSDP with one shard each: torchtitan's DDP would average gradients that must be summed. Its own
    # mesh has no process group for an axis of one.
    shape = (parallel_dims.dp_replicate, 1)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "fsdp"))
