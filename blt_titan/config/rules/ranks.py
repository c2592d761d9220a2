"""Rules on what is dealt over ranks: the degrees of parallelism, the batch, the streams. Each yields sentences."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from blt_titan.config.rules.bounds import shown
from blt_titan.job_config import Data
from blt_titan.titan import Checkpoint, Parallelism, Training

_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "context_parallel_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
)
_MOST_RANKS_NAMED = 4096
_RANKS = "--nproc x --nnodes (run_train.sh: NGPU x NNODES)"


class DataParallel(NamedTuple):
    """The two data-parallel degrees of a run."""

    replicate: int
    shard: int

    @property
    def ranks(self) -> int:
        """How many ranks read rows of their own."""
        return self.replicate * self.shard


def data_parallel(parallelism: Parallelism, world_size: int) -> DataParallel | None:
    """Return the data-parallel degrees, with the ranks that are left where the TOML says -1; None if ranks do not fit.

    >>> data_parallel(Parallelism(tensor_parallel_degree=2), world_size=8)
    DataParallel(replicate=1, shard=4)
    """
    degrees = {name: getattr(parallelism, name) for name in _DEGREES}
    shard = degrees.pop("data_parallel_shard_degree")
    others = math.prod(degrees.values())
    if shard == -1 and world_size % others == 0:
        shard = world_size // others
    if others * shard != world_size:
        return None
    return DataParallel(degrees["data_parallel_replicate_degree"], shard)


def degrees(parallelism: Parallelism, world_size: int) -> Iterator[str]:
    """The product of the degrees is the number of ranks."""
    if data_parallel(parallelism, world_size) is not None:
        return
    values = [getattr(parallelism, name) for name in _DEGREES]
    said = " x ".join(f"{name} {value}" for name, value in zip(_DEGREES, values, strict=True))
    if parallelism.data_parallel_shard_degree == -1:
        yield f"parallelism: {said} (-1 takes what is left) does not divide {world_size} ranks"
    else:
        yield f"parallelism: {said} makes {math.prod(values)} ranks, but {_RANKS} gives {world_size}"


def batch(training: Training, parallelism: Parallelism, world_size: int) -> Iterator[str]:
    """A global batch is a number of micro-batches of every data-parallel rank."""
    dp = data_parallel(parallelism, world_size)
    if dp is None or training.global_batch_size == -1:
        return
    together = training.local_batch_size * dp.ranks
    if training.global_batch_size % together:
        yield (
            f"training.global_batch_size = {training.global_batch_size}: must be a multiple of "
            f"training.local_batch_size = {training.local_batch_size} x {dp.ranks} data-parallel ranks = {together}"
        )


def streams(data: Data, parallelism: Parallelism, world_size: int) -> Iterator[str]:
    """Each data-parallel rank has as many streams as any other."""
    dp = data_parallel(parallelism, world_size)
    if dp is not None and data.streams % dp.ranks:
        most = min(data.streams, _MOST_RANKS_NAMED)
        fitting = ", ".join(str(ranks) for ranks in range(1, most + 1) if data.streams % ranks == 0)
        yield (
            f"data.streams = {data.streams}: must be a multiple of {dp.ranks} data-parallel ranks; with as many "
            f"streams there may be {fitting} ranks, and a run keeps its streams"
        )


def seed_checkpoint(checkpoint: Checkpoint, world_size: int) -> Iterator[str]:
    """A seed checkpoint is written by one rank, from nothing."""
    if not checkpoint.create_seed_checkpoint:
        return
    key = "checkpoint.create_seed_checkpoint = true"
    if world_size > 1 or not checkpoint.enable:
        yield f"{key} needs one rank (--nproc 1, of run_train.sh NGPU=1) and checkpoint.enable = true"
    for name, default in (("load_only", False), ("initial_load_path", None), ("load_step", -1)):
        if (value := getattr(checkpoint, name)) != default:
            yield f"{key} with checkpoint.{name} = {shown(value)}: a seed checkpoint begins from nothing"
