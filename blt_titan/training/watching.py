"""Between a run and what watches it: the record in its folder, the monitor of rank 0, and what each rank measured."""

import os
import socket
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blt_titan.config.run_config import RunConfig
from blt_titan.monitor.monitor import RunMonitor
from blt_titan.monitor.record import RunRecord
from blt_titan.monitor.watch import RankFigures
from blt_titan.titan import ParallelDims


def begin_record(record: RunRecord, config: RunConfig) -> None:
    """Begin the record of a run; on rank 0 once it has the folder, on others once they have met rank 0."""
    record.begin(
        config.job.dump_folder,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        steps=config.training.steps,
        log_freq=config.metrics.log_freq,
        checkpoints=Path(config.job.dump_folder) / config.checkpoint.folder,
    )


def make_monitor(config: RunConfig, parallel_dims: ParallelDims, record: RunRecord) -> RunMonitor | None:
    """Return what watches a run, on rank 0; collective."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    if dist.get_rank() != 0:
        return None
    return RunMonitor(
        config.monitor,
        record=record,
        run=config.job.dump_folder,
        steps=config.training.steps,
        hosts=hosts,
        stages=parallel_dims.pp,
        sharing=parallel_dims.cp * parallel_dims.tp,
    )


def figures_of_ranks(own: RankFigures, device: torch.device) -> list[RankFigures]:
    """Return what each rank measured; collective, and waits for the device."""
    if (n_ranks := dist.get_world_size()) == 1:
        return [own]
    figures = torch.zeros(n_ranks, len(astuple(own)), dtype=torch.float64)
    figures[dist.get_rank()] = torch.tensor(astuple(own), dtype=torch.float64)
    figures = figures.to(device)
    dist.all_reduce(figures)
    return [RankFigures(*of_rank) for of_rank in figures.tolist()]
