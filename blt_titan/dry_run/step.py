"""One training step as a run makes it, on tensors without data: the model split, compiled and clipped by its own code.

Two steps of two micro-batches are made. The first compiles, and makes what every later one finds: optimizer state, the
lazy state of FSDP; figures are those of the second.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from blt_titan.batch import Batch
from blt_titan.byte_vocab import BOS_ID
from blt_titan.config.rules.ranks import data_parallel
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import Row, RowShape
from blt_titan.dry_run.memory import BATCH, GRADIENTS, OPTIMIZER, PARAMETERS, LiveBytes
from blt_titan.dry_run.watch import Watch
from blt_titan.titan import TORCH_DTYPE_MAP, ParallelDims, build_model_converters, build_optimizers
from blt_titan.training.loader import context_slice
from blt_titan.training.spec import TRAIN_SPECS
from parallelisms.clipping import clip_grad_norm
from parallelisms.hash_tables import reduce_partial_gradients
from parallelisms.meshes import Meshes, build_meshes
from parallelisms.parallelize import parallelize_part

MICRO_BATCHES = 2
"""A step has two: the second adds to gradients that are there."""


@dataclass
class Step:
    """A model with its optimizer, ready to be stepped."""

    model: Any
    optimizers: Any
    batch: Batch
    loss_fn: Any
    max_norm: float
    autocast: Callable[[], AbstractContextManager[Any]]
    watch: Watch
    memory: LiveBytes

    def run(self) -> None:
        """Make one step."""
        watch, memory = self.watch, self.memory
        parameters = list(self.model.parameters())
        n_targets = torch.ones((), device="cuda")
        with watch:
            with self.loss_fn.step(n_targets):
                for _ in range(MICRO_BATCHES):
                    self._micro_batch()
                    memory.name([p.grad for p in parameters if p.grad is not None], GRADIENTS)
            with watch.at(phase="clip"):
                reduce_partial_gradients(parameters)
                memory.name([p.grad for p in parameters if p.grad is not None], GRADIENTS)
                clip_grad_norm(parameters, self.max_norm, pp_mesh=None)
            with watch.at(phase="update"):
                self.optimizers.step()
                memory.name(self._optimizer_state(), OPTIMIZER)
                self.optimizers.zero_grad()

    def _micro_batch(self) -> None:
        with self.watch.at(phase="batch"):
            # Fake tensors cannot be page-locked, as `Batch.to` has them.
            batch = self.batch.map(lambda tensor: tensor.to("cuda", non_blocking=True))
            self.memory.name([batch.ids_BS, batch.labels_BS], BATCH)
        with self.watch.at(phase="forward"), self.autocast():
            logits = self.model(batch.ids_BS, batch.layout)
        with self.watch.at(phase="loss"), self.autocast():
            loss = self.loss_fn(logits, batch.labels_BS)
            del logits
        self.memory.after_forward = self.memory.now()
        with self.watch.at(phase="backward"):
            loss.backward()

    def _optimizer_state(self) -> list[torch.Tensor]:
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def _parallel_dims(config: RunConfig, world_size: int) -> ParallelDims:
    """Return the degrees of a run."""
    dp = data_parallel(config.parallelism, world_size)
    assert dp is not None, "the settings are not sound"
    return ParallelDims(
        dp_replicate=dp.replicate,
        dp_shard=dp.shard,
        cp=config.parallelism.context_parallel_degree,
        tp=config.parallelism.tensor_parallel_degree,
        pp=1,
        ep=1,
        etp=1,
        world_size=world_size,
    )


@dataclass(frozen=True)
class Place:
    """A rank of a run, and what it is given; made outside of the fake mode, because meshes hold numbers."""

    dims: ParallelDims
    meshes: Meshes | None
    batch: Batch
    """On the CPU."""


def take_place(config: RunConfig, world_size: int) -> Place:
    """Make this process one of so many ranks, of which the others are not there.

    It takes the place in the middle of those that share a row: it has neighbours on both sides, if any has.
    """
    row_ranks = config.parallelism.context_parallel_degree * config.parallelism.tensor_parallel_degree
    dist.init_process_group("fake", rank=row_ranks // 2, world_size=world_size, store=FakeStore())
    dims = _parallel_dims(config, world_size)
    return Place(dims, build_meshes(dims) if world_size > 1 else None, _make_batch(config))


def _make_batch(config: RunConfig) -> Batch:
    """Make a batch of the run's shape on the CPU; each row is one patch of a document, for only shapes count."""
    data, training = config.data, config.training
    segments = training.seq_len // data.segment_bytes
    shape = RowShape(segments, data.segment_bytes, data.segment_patches)
    row = Row(np.array([BOS_ID, 65], np.int16), np.array([0, 1]), np.ones(segments, np.int64))
    return collate_rows([row] * training.local_batch_size, shape, context_slice(config))


def make_step(config: RunConfig, place: Place, watch: Watch, memory: LiveBytes) -> Step:
    """Build the model and its optimizer, as the trainer does; to be called in the fake mode.

    Args:
        config: sound settings, without a pipeline.
        place: of `take_place`.
        watch: entered here and in `Step.run`.
        memory: one of its observers.
    """
    spec = TRAIN_SPECS[config.model.name]
    args = spec.model_args[config.model.flavor]
    args.update_from_config(config)
    # A module that is not split cannot change a meta parameter for one without data.
    with torch.device("meta" if place.meshes is not None else "cuda"):
        model: Any = spec.model_cls(args)
    converters = build_model_converters(config, place.dims)
    converters.convert(model)
    model = parallelize_part(model, place.meshes, config)
    watch.follow(model)
    memory.follow_fsdp()
    with watch:
        if place.meshes is not None:
            model.to_empty(device="cuda")
        memory.name(model.parameters(), PARAMETERS)
        optimizers = build_optimizers([model], config.optimizer, place.dims)
        optimizers.register_step_post_hook(lambda *_: converters.post_optimizer_hook([model]))
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    # As in the trainer: with more than one rank fully_shard casts.
    casts = place.meshes is None and dtype != torch.float32
    return Step(
        model=model,
        optimizers=optimizers,
        batch=place.batch,
        loss_fn=spec.build_loss_fn(config),
        max_norm=config.training.max_norm,
        autocast=(lambda: torch.autocast("cuda", dtype)) if casts else nullcontext,
        watch=watch,
        memory=memory,
    )


def fake_mode() -> FakeTensorMode:
    """Return the mode in which tensors have no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)
