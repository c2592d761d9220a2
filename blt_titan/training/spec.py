"""The registration of our models in torchtitan: `blt` and `blt_entropy`, each as one `TrainSpec`.

Importing this module registers both. Everything a run needs beside the trainer is named here.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

import blt_titan.titan  # noqa: F401

# isort: split
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from blt_titan.batch import WHOLE_ROW, ContextSlice
from blt_titan.checkpoint.load import load_entropy_model
from blt_titan.data.rows.held_out import HeldOutRows
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.mixture import MixtureOrder, ShardSets, mixture_order
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.patcher import BatchEntropies, EntropyPatcher, TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.shards import RecordBatch, ShardSet
from blt_titan.data.store.sidecars import EntropySidecar, EntropySidecars, fingerprint_of
from blt_titan.loss import ByteCrossEntropy
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import BLT_FLAVORS, ENTROPY_FLAVORS
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer, OnlineEntropies, Share
from blt_titan.scoring.score_data import sidecar_settings
from blt_titan.training.metrics import BLTMetrics
from blt_titan.training.validator import BLTValidator
from parallelisms.parallelize import parallelize, run_halo_slices
from parallelisms.pipeline import pipeline


def patch_rule(job_config: Any) -> PatchRule:
    """Return the run's rule, as the TOML says it."""
    return PatchRule.of(job_config.patching)


def goes_by_entropy(job_config: Any) -> bool:
    """Tell whether the run's patching rule asks for entropies."""
    return patch_rule(job_config).by_entropy


def row_source(job_config: Any, split: str, seq_len: int) -> RowSource:
    """Return what makes the rows of one split.

    Raises:
        DataError: if the data or its entropies are missing or damaged.
        CheckpointError: if the entropy model of `patching.source = "online"` cannot be loaded.
    """
    data = job_config.data
    shape = RowShape(seq_len // data.segment_bytes, data.segment_bytes, data.segment_patches)
    shards, rule = open_shards(job_config, split), patch_rule(job_config)
    if not rule.by_entropy:
        return RowSource(shards, TextPatcher(rule), shape)
    return RowSource(shards, EntropyPatcher(rule, _entropies(job_config, shards)), shape)


def entropies_fingerprint(job_config: Any, shards: ShardSets) -> str | None:
    """Return the fingerprint of the model that a run's patches go by; None if they go by none.

    Raises:
        DataError: a sidecar is missing, incomplete or of another text.
        CheckpointError: the entropy model cannot be loaded.
    """
    if not goes_by_entropy(job_config):
        return None
    if job_config.patching.source == "sidecar":
        return open_sidecars(job_config, shards).fingerprint
    return online_model(job_config.patching.entropy_checkpoint)[1]


def dataset_paths(job_config: Any) -> list[str]:
    """Return the directories of the run's byte shards."""
    return list(job_config.data.mixture) or [job_config.training.dataset_path]


def open_shards(job_config: Any, split: str) -> ShardSets:
    """Open one split of the run's data.

    Raises:
        DataError: a directory is missing or damaged, or has no such split.
    """
    return ShardSets([ShardSet(path, split) for path in dataset_paths(job_config)])


def stream_order(job_config: Any, shards: ShardSets) -> StreamOrder | MixtureOrder:
    """Return the order of the run's training data.

    Raises:
        DataError: the weights of a mixture cannot be had.
    """
    data = job_config.data
    if not data.mixture:
        return StreamOrder(len(shards), data.streams, data.seed)
    return mixture_order(shards, list(data.mixture.values()), streams=data.streams, seed=data.seed)


def open_sidecars(job_config: Any, shards: ShardSets) -> EntropySidecars:
    """Open the entropies of one split, of each of the run's directories.

    Raises:
        DataError: a sidecar is missing, incomplete or of another text.
    """
    name = job_config.patching.sidecar
    paths = dataset_paths(job_config)
    return EntropySidecars([EntropySidecar(path, name, s) for path, s in zip(paths, shards.sets, strict=True)])


def _entropies(job_config: Any, shards: ShardSets) -> BatchEntropies:
    patching = job_config.patching
    if patching.source == "sidecar":
        return open_sidecars(job_config, shards)
    scorer, fingerprint = _online_scorer(patching.entropy_checkpoint)
    return OnlineEntropies(scorer, _share_rows(job_config), fingerprint)


@cache
def _online_scorer(checkpoint: str) -> tuple[EntropyScorer, str]:
    """One for training and validation; and the fingerprint of its model."""
    model, fingerprint = online_model(checkpoint)
    return EntropyScorer(model.to(device_type)), fingerprint


@cache
def online_model(checkpoint: str) -> tuple[EntropyModel, str]:
    """Load the entropy model that a run scores with, and make its fingerprint: once in a process, and kept.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    model = load_entropy_model(checkpoint)
    return model, fingerprint_of(sidecar_settings(model, OnlineEntropies.storage, "float32"))


class RowsDifferError(RuntimeError):
    """Ranks that read the same rows are not at the same place of the data."""


class RowRanks:
    """The ranks that read the same rows: those of a data-parallel rank, over pp, cp and tp.

    Building it is collective over all ranks.
    """

    def __init__(self, pp: int, context: int):
        ranks = torch.arange(dist.get_world_size()).view(pp, -1, context)
        group, _ = dist.new_subgroups_by_enumeration(ranks.transpose(0, 1).flatten(1).tolist())
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

    def share(self, make: Callable[[], np.ndarray], batch: RecordBatch) -> np.ndarray:
        """Have the first rank make the entropies of a record batch, fp32 [text bytes], and give them to all.

        Raises:
            RowsDifferError: the ranks are at different record batches.
        """
        if not self.agree(batch.crc32):
            raise RowsDifferError(
                f"rank {dist.get_rank()}: ranks that read the same rows are at different record batches, this one at "
                f"{batch.shard_path}: record batch {batch.batch_in_shard}. One of them passed over what others could "
                "read (their logs say what): see that all nodes have the same files"
            )
        shared = torch.empty(len(batch.text), device=device_type)
        if self.group.rank() == 0:
            shared.copy_(torch.from_numpy(make()))
        dist.broadcast(shared, group=self.group, group_src=0)
        return shared.cpu().numpy()

    def agree(self, value: int) -> bool:
        """Tell whether all ranks have the same value."""
        ends = torch.tensor([value, -value], device=device_type)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.group)
        return bool(ends.sum() == 0)


def row_ranks(job_config: Any) -> RowRanks | None:
    """Return the ranks that read the same rows as this one; None if it is alone. Collective when first called."""
    parallelism = job_config.parallelism
    context = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    pp = parallelism.pipeline_parallel_degree
    return _row_ranks(dist.group.WORLD, pp, context) if pp * context > 1 else None


@cache
def _row_ranks(_world: Any, pp: int, context: int) -> RowRanks:
    return RowRanks(pp, context)


def _share_rows(job_config: Any) -> Share | None:
    ranks = row_ranks(job_config)
    return ranks.share if ranks else None


def context_slice(job_config: Any) -> ContextSlice:
    """Return the slice of each row that this rank takes: ranks count up through tp, then cp."""
    parallelism = job_config.parallelism
    count = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    if count == 1:
        return WHOLE_ROW
    args = BLT_FLAVORS[job_config.model.flavor]
    return ContextSlice(
        index=dist.get_rank() % count,
        count=count,
        window_bytes=args.local_window,
        reach_bytes=max(args.local_window, *args.hash_ngrams) - 1,
        halo_slices=run_halo_slices(job_config, args.local_window),
    )


def build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: None, job_config: Any) -> RowLoader:
    """Build the training loader of one data-parallel rank (torchtitan's `build_dataloader_fn`)."""
    source = row_source(job_config, "train", job_config.training.seq_len)
    settings = job_config.training.dataloader
    online = isinstance(source.patcher, EntropyPatcher) and isinstance(source.patcher.entropies, OnlineEntropies)
    if online and settings.num_workers:
        logger.info("patching.source = 'online': rows are made in the training process, without worker processes")
    loader = RowLoader(
        source,
        stream_order(job_config, cast(ShardSets, source.shards)),
        dp_rank=dp_rank,
        dp_size=dp_world_size,
        rows_per_batch=job_config.training.local_batch_size,
        context_slice=context_slice(job_config),
        num_workers=0 if online else settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
        # Pinning is for copies to an accelerator, and needs one.
        pin_memory=settings.pin_memory and device_type != "cpu",
        quarantine=job_config.data.on_damage == "quarantine",
        quarantine_log=Path(job_config.job.dump_folder) / "quarantined.jsonl",
        patching_may_change=job_config.patching.allow_change,
        merge_positions=_merge_positions if dp_world_size > 1 else None,
    )
    if loader.num_workers != settings.num_workers and not online:
        logger.info(
            f"training.dataloader.num_workers = {settings.num_workers} lowered to {loader.num_workers}, a divisor of "
            f"the {job_config.data.streams // dp_world_size} streams of a rank"
        )
    return loader


def build_validator(
    *, job_config: Any, dp_world_size: int, dp_rank: int, parallel_dims: ParallelDims, metrics_processor: Any, **context
) -> BLTValidator:
    """Build the held-out validation of one rank (torchtitan's `build_validator_fn`)."""
    validation, training = job_config.validation, job_config.training
    rows_per_batch = training.local_batch_size if validation.local_batch_size < 0 else validation.local_batch_size
    if parallel_dims.pp_enabled and rows_per_batch != training.local_batch_size:
        logger.info(
            f"validation.local_batch_size = {rows_per_batch} follows training.local_batch_size = "
            f"{training.local_batch_size}, which the pipeline is built for; the held-out figure does not depend on it"
        )
        rows_per_batch = training.local_batch_size
    rows = HeldOutRows(
        row_source(job_config, "validation", training.seq_len if validation.seq_len < 0 else validation.seq_len),
        dp_rank=dp_rank,
        dp_size=dp_world_size,
        rows_per_batch=rows_per_batch,
        max_rows=None if validation.steps < 0 else validation.steps,
        context_slice=context_slice(job_config),
    )
    return BLTValidator(
        job_config,
        rows,
        parallel_dims=parallel_dims,
        metrics=metrics_processor,
        autocast=context["maybe_enable_amp"],
        loss_fn=context["loss_fn"],
        pp_schedule=context["pp_schedule"],
        has_first_stage=bool(context["pp_has_first_stage"]),
        has_last_stage=not parallel_dims.pp_enabled or bool(context["pp_has_last_stage"]),
    )


def build_loss(job_config: JobConfig, **context: Any) -> ByteCrossEntropy:
    """Build the loss (torchtitan's `build_loss_fn`)."""
    return ByteCrossEntropy()


def _merge_positions(positions: torch.Tensor) -> torch.Tensor:
    """Make the table of stream positions whole: ranks that do not own an entry hold -1 there."""
    table = positions.to(device_type)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return table.cpu()


def _spec(model_cls: Any, flavors: Any, pipelining_fn: Any = None) -> TrainSpec:
    return TrainSpec(
        model_cls=model_cls,
        model_args=flavors,
        parallelize_fn=parallelize,
        pipelining_fn=pipelining_fn,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,  # pyright: ignore[reportArgumentType]
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=BLTMetrics,
    )


TRAIN_SPECS = {"blt": _spec(BLT, BLT_FLAVORS, pipeline), "blt_entropy": _spec(EntropyModel, ENTROPY_FLAVORS)}

for _name, _train_spec in TRAIN_SPECS.items():
    register_train_spec(_name, _train_spec)
