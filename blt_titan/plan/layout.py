"""How a run is laid out: its degrees, its FLOPs, the ranks that are looked at."""

from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from blt_titan.config.rules.ranks import data_parallel
from blt_titan.config.run_config import RunConfig
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.plan.time import Compute
from blt_titan.training.spec import TRAIN_SPECS
from parallelisms.pipeline import V_SCHEDULES, cut_layers, n_stages

MEASURED_STAGES = 4
"""Ranks of a pipeline that are looked at: all of so many, else the first two, the middle and the last."""
_SELECTIVE_OP_SHARE = 0.5
"""What "op" computes again: every second product."""


@dataclass(frozen=True)
class Layout:
    """Degrees of a run on a number of ranks."""

    world_size: int
    replicas: int
    shards: int
    cp: int
    tp: int
    pp: int
    stages_per_rank: int
    """Stages of the pipeline that a rank holds."""

    @property
    def dp(self) -> int:
        """Ranks, or groups of them, that have rows of their own."""
        return self.replicas * self.shards

    def name(self) -> str:
        """Return the degrees above 1 in words."""
        degrees = {"replicas": self.replicas, "fsdp": self.shards, "cp": self.cp, "tp": self.tp, "pp": self.pp}
        return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one rank"


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """Return the layout of sound settings."""
    dp = data_parallel(config.parallelism, world_size)
    assert dp is not None, "the settings are not sound"
    parallelism = config.parallelism
    args, pp = args_of(config), parallelism.pipeline_parallel_degree
    stages = n_stages(parallelism, args.global_layers) // pp if pp > 1 and isinstance(args, BLTArgs) else 1
    return Layout(
        world_size=world_size,
        replicas=dp.replicate,
        shards=dp.shard,
        cp=parallelism.context_parallel_degree,
        tp=parallelism.tensor_parallel_degree,
        pp=pp,
        stages_per_rank=stages,
    )


def args_of(config: RunConfig) -> BLTArgs | EntropyModelArgs:
    """Return the sizes of the run's model."""
    args: Any = TRAIN_SPECS[config.model.name].model_args[config.model.flavor]
    return args


def mean_patch_bytes(config: RunConfig) -> float:
    """Return the patch length for which rows are shaped."""
    return config.data.segment_bytes / config.data.segment_patches


def measured_ranks(layout: Layout) -> list[int]:
    """Return the ranks that are looked at: one of each part of the pipeline, else one, since all are alike."""
    row_ranks = layout.cp * layout.tp
    own = layout.world_size // layout.pp
    stages = range(layout.pp)
    if layout.pp > MEASURED_STAGES:
        stages = sorted({0, 1, layout.pp // 2, layout.pp - 1})
    return [stage * own + row_ranks // 2 for stage in stages]


def micro_batches(config: RunConfig, layout: Layout) -> int:
    """Return the rounds of gradient accumulation in a step."""
    training = config.training
    if training.global_batch_size <= 0:
        return 1
    return training.global_batch_size // (training.local_batch_size * layout.dp)


def step_bytes(config: RunConfig, layout: Layout) -> int:
    """Return the byte slots of a step."""
    return config.training.local_batch_size * micro_batches(config, layout) * layout.dp * config.training.seq_len


def compute_of(config: RunConfig, layout: Layout) -> Compute:
    """Return what the busiest rank computes in a step."""
    args, training = args_of(config), config.training
    patch_bytes = mean_patch_bytes(config)
    per_rank = step_bytes(config, layout) / layout.world_size
    forward = args.forward_flops_per_byte(training.seq_len, patch_bytes)
    again, imbalance, bubble = 0.0, 1.0, 0.0
    if isinstance(args, BLTArgs):
        parts = args.flops_by_part(training.seq_len, patch_bytes)
        again = args.global_layers * parts.global_layer * _recomputed_share(config)
        if config.local_blocks.activation_checkpoint == "full":
            again += parts.encoder + parts.decoder
        if layout.pp > 1:
            total = layout.pp * layout.stages_per_rank
            costs = [parts.global_layer] * args.global_layers
            cuts = cut_layers(parts.encoder, costs, parts.decoder, total)
            stage_flops = [len(cut) * parts.global_layer for cut in cuts]
            stage_flops[0] += parts.encoder
            stage_flops[-1] += parts.decoder
            v_shaped = config.parallelism.pipeline_parallel_schedule in V_SCHEDULES
            own = [
                sum(stage_flops[i] for i in ((r, total - 1 - r) if v_shaped else range(r, total, layout.pp)))
                for r in range(layout.pp)
            ]
            imbalance = max(own) / (sum(own) / layout.pp)
            bubble = _bubble(config, layout)
    elif config.activation_checkpoint.mode != "none":
        again = forward * _recomputed_share(config)
    return Compute(
        flops=3 * forward * per_rank,
        recomputed_flops=again * per_rank,
        imbalance=imbalance,
        bubble=bubble,
        micro_batches=micro_batches(config, layout),
    )


def _recomputed_share(config: RunConfig) -> float:
    checkpointing = config.activation_checkpoint
    if checkpointing.mode == "full":
        return 1.0
    if checkpointing.mode == "selective":
        option = checkpointing.selective_ac_option
        return _SELECTIVE_OP_SHARE if option == "op" else 1 / int(option)
    return 0.0


def _bubble(config: RunConfig, layout: Layout) -> float:
    parallelism = config.parallelism
    rounds = config.training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
    waits = (layout.pp - 1) / rounds
    name = parallelism.pipeline_parallel_schedule
    if issubclass(get_schedule_class(name), PipelineScheduleSingle):
        return waits
    # Gradients of weights fill most of what is left: a third stays, and next to nothing in the V shape.
    share = {"InterleavedZeroBubble": 1 / 3, "ZBVZeroBubble": 0.0, "DualPipeV": 0.0}.get(name, 1.0)
    return waits / layout.stages_per_rank * share
