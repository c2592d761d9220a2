"""The training loader of a rank: what torchtitan asks for as `build_dataloader_fn`."""

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from blt_titan.batch import WHOLE_ROW, ContextSlice
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.mixture import ShardSets
from blt_titan.data.rows.patcher import EntropyPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.scoring.online import OnlineEntropies
from blt_titan.titan import device_type, logger
from blt_titan.training.data import fetching_of, row_source, stream_order
from blt_titan.training.patience import fetch_timeout_s, worker_wait_s
from blt_titan.training.row_ranks import row_ranks
from parallelisms.parallelize import run_halo_slices


def build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: None, job_config: RunConfig) -> RowLoader:
    """Build the training loader of one data-parallel rank."""
    source = split_source(job_config, "train", job_config.training.seq_len)
    settings = job_config.training.dataloader
    online = isinstance(source.patcher, EntropyPatcher) and isinstance(source.patcher.entropies, OnlineEntropies)
    if online and settings.num_workers:
        logger.info("patching.source = 'online': rows are made in the training process, without worker processes")
    loader = RowLoader(
        source,
        stream_order(job_config.data, cast(ShardSets, source.shards)),
        dp_rank=dp_rank,
        dp_size=dp_world_size,
        rows_per_batch=job_config.training.local_batch_size,
        context_slice=context_slice(job_config),
        num_workers=0 if online else settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
        wait_s=worker_wait_s(job_config.data, job_config.comm, dist.get_world_size()),
        quarantine=job_config.data.on_damage == "quarantine",
        quarantine_log=Path(job_config.job.dump_folder) / "quarantined.jsonl",
        patching_may_change=job_config.patching.allow_change,
        merge_positions=merge_positions if dp_world_size > 1 else None,
    )
    if loader.num_workers != settings.num_workers and not online:
        logger.info(
            f"training.dataloader.num_workers = {settings.num_workers} lowered to {loader.num_workers}, a divisor of "
            f"the {job_config.data.streams // dp_world_size} streams of a rank"
        )
    return loader


def split_source(job_config: RunConfig, split: str, seq_len: int) -> RowSource:
    """Return what makes the rows of one split of a run, among the ranks that read the same ones."""
    ranks = row_ranks(job_config.parallelism) if job_config.patching.source == "online" else None
    timeout_s = fetch_timeout_s(job_config.data, job_config.heartbeat, job_config.comm, dist.get_world_size())
    return row_source(
        job_config.data,
        job_config.training,
        job_config.patching,
        split,
        seq_len=seq_len,
        share=ranks.share if ranks else None,
        fetching=fetching_of(job_config.data, timeout_s),
    )


def context_slice(job_config: RunConfig) -> ContextSlice:
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


def merge_positions(positions: torch.Tensor) -> torch.Tensor:
    """Make the table of stream positions whole: ranks that do not own an entry hold -1 there; collective."""
    table = positions.to(device_type)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return table.cpu()


def most_documents(job_config: RunConfig) -> int | None:
    """Return the bound on the documents of a row; None if attention asks for none."""
    model = job_config.model
    return model.varlen_documents if model.attention_backend == "varlen" else None
