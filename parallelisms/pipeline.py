"""Pipeline parallelism: stages cut between global blocks, balanced by FLOPs.

The first stage holds hash tables and encoder, the last the decoder. Stages hand over patch states and byte states; the
layout of the rows reaches every stage as a keyword argument, whose tensors schedules split into micro-batches on dim 0.

Cuts minimise the largest stage's FLOPs. A decoder is heavy: 31 % of a 1B, so 3 stages balance and 4 do not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from blt_titan.config.run_config import RunConfig
from blt_titan.titan import TORCH_DTYPE_MAP, ParallelDims, Parallelism, build_pipeline_schedule, logger
from parallelisms.meshes import Meshes, build_meshes
from parallelisms.parallelize import parallelize_part

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""What `parallelism.pipeline_parallel_schedule` may be, as written here."""

V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
"""Schedules whose ranks hold one stage from the front and one from the back."""

SPLIT_BACKWARD_SCHEDULES = ("InterleavedZeroBubble", *V_SCHEDULES)
"""Schedules that compute gradients of inputs and of weights apart."""


def cut_layers(encoder_cost: float, layer_costs: Sequence[float], decoder_cost: float, n_stages: int) -> list[range]:
    """Cut the layers into `n_stages` runs so that the largest stage costs as little as possible.

    The encoder goes to the first stage, the decoder to the last; these two may have no layers, the others not.

    >>> cut_layers(1, [1] * 6, 3, 2)
    [range(0, 4), range(4, 6)]

    Raises:
        ValueError: if there are too few layers.
    """
    n_layers = len(layer_costs)
    if n_stages - 2 > n_layers:
        raise ValueError(f"{n_stages} stages need at least {n_stages - 2} global layers, got {n_layers}")
    # best[s][l]: least maximum over the first s stages that hold the first l layers, and where the last of them begins.
    best: list[list[tuple[float, int]]] = [[(math.inf, 0)] * (n_layers + 1) for _ in range(n_stages + 1)]
    best[0][0] = (0.0, 0)
    for stage in range(1, n_stages + 1):
        first, last = stage == 1, stage == n_stages
        for end in range(n_layers + 1):
            for begin in range(end + 1):
                if begin == end and not (first or last):
                    continue
                cost = sum(layer_costs[begin:end]) + encoder_cost * first + decoder_cost * last
                candidate = max(best[stage - 1][begin][0], cost)
                if candidate < best[stage][end][0]:
                    best[stage][end] = (candidate, begin)
    cuts, end = [], n_layers
    for stage in range(n_stages, 0, -1):
        begin = best[stage][end][1]
        cuts.append(range(begin, end))
        end = begin
    return cuts[::-1]


def n_stages(parallelism: Parallelism, n_layers: int) -> int:
    """Return the number of stages: by `pipeline_parallel_layers_per_stage`, else 1 per rank, 2 for looped schedules."""
    pp = parallelism.pipeline_parallel_degree
    if per_stage := parallelism.pipeline_parallel_layers_per_stage:
        return math.ceil(n_layers / per_stage)
    schedule = get_schedule_class(parallelism.pipeline_parallel_schedule)
    return pp if issubclass(schedule, PipelineScheduleSingle) else 2 * pp


def pipeline(
    model: Any,
    parallel_dims: ParallelDims,
    job_config: RunConfig,
    device: torch.device,
    model_args: Any,
    parallelize_fn: Callable,
    loss_fn: Callable,
) -> tuple[Any, list[nn.Module], bool, bool]:
    """Cut `model` into stages, split each over the rest of the mesh, build the schedule (torchtitan's `pipelining_fn`).

    Args:
        model: a BLT on the meta device; stages take its modules.
        parallel_dims: the run's meshes.
        job_config: the run's settings.
        device: of this rank.
        model_args: sizes.
        parallelize_fn: not called: stages share one set of meshes.
        loss_fn: of logits and labels.

    Returns:
        The schedule, this rank's stages as models, and whether it has the first and the last stage.
    """
    return schedule_stages(model, build_meshes(parallel_dims), parallel_dims, job_config, device, model_args, loss_fn)


def schedule_stages(
    model: Any,
    meshes: Meshes,
    parallel_dims: ParallelDims,
    job_config: RunConfig,
    device: torch.device,
    model_args: Any,
    loss_fn: Callable,
) -> tuple[Any, list[nn.Module], bool, bool]:
    """Do as `pipeline` does, with meshes that were built before."""
    pp_mesh = parallel_dims.get_mesh("pp")
    pp_rank, pp = pp_mesh.get_local_rank(), pp_mesh.size()
    schedule_name = job_config.parallelism.pipeline_parallel_schedule
    flops = model_args.flops_by_part(job_config.training.seq_len, model_args.nominal_patch_bytes)
    total = n_stages(job_config.parallelism, model_args.global_layers)
    cuts = cut_layers(flops.encoder, [flops.global_layer] * model_args.global_layers, flops.decoder, total)
    own = [pp_rank, total - 1 - pp_rank] if schedule_name in V_SCHEDULES else list(range(pp_rank, total, pp))
    logger.info(
        f"Pipeline stages of global layers {[f'{c.start}-{c.stop - 1}' if c else 'none' for c in cuts]}, "
        f"this rank has stages {own}"
    )
    stages, parts = [], []
    for index in own:
        part = model.stage(cuts[index], is_first=index == 0, is_last=index == total - 1)
        part = parallelize_part(part, meshes, job_config)
        parts.append(part)
        inputs, outputs = _boundary_tensors(job_config, model_args, is_first=index == 0, is_last=index == total - 1)
        # Given, so that torch does not run the first micro-batch through the model to find the shapes.
        stages.append(PipelineStage(part, index, total, device, inputs, outputs, group=pp_mesh.get_group()))
    schedule = build_pipeline_schedule(job_config, stages, loss_fn)
    return schedule, parts, own[0] == 0, total - 1 in own


def _boundary_tensors(job_config: RunConfig, args: Any, *, is_first: bool, is_last: bool) -> tuple[Any, Any]:
    """Tensors of the shape and dtype that a stage takes and gives, on the meta device."""
    parallelism, data = job_config.parallelism, job_config.data
    rows = parallelism.pipeline_parallel_microbatch_size
    slices = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    S = job_config.training.seq_len // slices
    P = job_config.training.seq_len // data.segment_bytes * data.segment_patches // slices
    dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]

    def states() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(  # pyright: ignore[reportReturnType]
            torch.empty(rows, *shape, dtype=dtype, device="meta", requires_grad=True)
            for shape in ((P, args.global_dim), (S, args.local_dim))
        )

    ids = torch.empty(rows, S, dtype=torch.int32, device="meta")
    logits = torch.empty(rows, S, args.vocab_size, dtype=torch.float32, device="meta", requires_grad=True)
    return (ids,) if is_first else states(), (logits,) if is_last else states()
