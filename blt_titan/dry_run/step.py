"""One training step as a run makes it, on tensors without data: the model split, compiled and clipped by its own code.

Two steps are made, of two micro-batches where the run accumulates gradients. The first compiles, and makes what every
later one finds: optimizer state, the lazy state of FSDP; figures are those of the second.
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
from blt_titan.dry_run.watch import SCHEDULE, Watch
from blt_titan.titan import TORCH_DTYPE_MAP, ParallelDims, build_model_converters, build_optimizers
from blt_titan.training.loader import context_slice
from blt_titan.training.spec import TRAIN_SPECS
from parallelisms.clipping import clip_grad_norm
from parallelisms.hash_tables import reduce_partial_gradients
from parallelisms.meshes import Meshes, build_meshes
from parallelisms.parallelize import parallelize_part
from parallelisms.pipeline import schedule_stages

_MOST_MICRO_BATCHES = 2
"""The second adds to gradients that are there; a third would find what the second does."""


@dataclass
class Step:
    """A model with its optimizer, ready to be stepped."""

    parts: list[Any]
    """The model, or this rank's stages of it."""
    schedule: Any
    """That of the pipeline; None without one."""
    is_first: bool
    is_last: bool
    """Whether this rank has the pipeline's first and its last stage."""
    optimizers: Any
    batch: Batch
    loss_fn: Any
    max_norm: float
    autocast: Callable[[], AbstractContextManager[Any]]
    watch: Watch
    memory: LiveBytes
    device: str
    pp_mesh: Any
    micro_batches: int

    def run(self) -> None:
        """Make one step."""
        watch, memory = self.watch, self.memory
        parameters = self.parameters()
        n_targets = torch.ones((), device=self.device)
        with watch:
            with self.loss_fn.step(n_targets):
                for _ in range(self.micro_batches):
                    self._micro_batch()
                    memory.name([p.grad for p in parameters if p.grad is not None], GRADIENTS)
            with watch.at(phase="clip"):
                reduce_partial_gradients(parameters)
                memory.name([p.grad for p in parameters if p.grad is not None], GRADIENTS)
                clip_grad_norm(parameters, self.max_norm, pp_mesh=self.pp_mesh)
            with watch.at(phase="update"):
                self.optimizers.step()
                memory.name(self._optimizer_state(), OPTIMIZER)
                self.optimizers.zero_grad()

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return this rank's parameters."""
        return [parameter for part in self.parts for parameter in part.parameters()]

    def _micro_batch(self) -> None:
        with self.watch.at(phase="batch"):
            # Fake tensors cannot be page-locked, as `Batch.to` has them.
            batch = self.batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
            self.memory.name([batch.ids_BS, batch.labels_BS], BATCH)
        if self.schedule is not None:
            self._by_schedule(batch)
            return
        with self.watch.at(phase="forward"), self.autocast():
            logits = self.parts[0](batch.ids_BS, batch.layout)
        with self.watch.at(phase="loss"), self.autocast():
            loss = self.loss_fn(logits, batch.labels_BS)
            del logits
        self.memory.after_forward = self.memory.now()
        with self.watch.at(phase="backward"):
            loss.backward()

    def _by_schedule(self, batch: Batch) -> None:
        """Run the schedule: what would be received is there, and what is sent goes nowhere."""
        target, losses = (batch.labels_BS, []) if self.is_last else (None, None)
        inputs = (batch.ids_BS,) if self.is_first else ()
        with self.watch.at(phase=SCHEDULE):
            self.schedule.step(*inputs, layout=batch.layout, target=target, losses=losses, return_outputs=False)

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
        pp=config.parallelism.pipeline_parallel_degree,
        ep=1,
        etp=1,
        world_size=world_size,
    )


@dataclass(frozen=True)
class Place:
    """A rank of a run, and what it is given; made outside of the fake mode, because meshes hold numbers."""

    dims: ParallelDims
    meshes: Meshes | None
    pp_mesh: Any
    """None without a pipeline."""
    batch: Batch
    """On the CPU."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the names of the axes that have more than one rank."""
        dims = self.dims
        degrees = {
            "dp_replicate": dims.dp_replicate,
            "fsdp": dims.dp_shard,
            "cp": dims.cp,
            "tp": dims.tp,
            "pp": dims.pp,
        }
        return tuple(name for name, degree in degrees.items() if degree > 1)


def take_place(config: RunConfig, world_size: int, rank: int | None = None) -> Place:
    """Make this process one of so many ranks, of which the others are not there.

    Args:
        config: sound settings.
        world_size: ranks of the whole job.
        rank: of this process; None for the one in the middle of those that share the first row, which has neighbours
            on both sides, if any has.
    """
    row_ranks = config.parallelism.context_parallel_degree * config.parallelism.tensor_parallel_degree
    rank = row_ranks // 2 if rank is None else rank
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dims = _parallel_dims(config, world_size)
    meshes = build_meshes(dims) if world_size > 1 else None
    return Place(dims, meshes, dims.get_optional_mesh("pp") if world_size > 1 else None, _make_batch(config))


def _make_batch(config: RunConfig) -> Batch:
    """Make a batch of the run's shape on the CPU; each row is one patch of a document, for only shapes count."""
    data, training = config.data, config.training
    segments = training.seq_len // data.segment_bytes
    shape = RowShape(segments, data.segment_bytes, data.segment_patches)
    row = Row(np.array([BOS_ID, 65], np.int16), np.array([0, 1]), np.ones(segments, np.int64))
    return collate_rows([row] * training.local_batch_size, shape, context_slice(config))


def make_step(config: RunConfig, place: Place, watch: Watch, memory: LiveBytes, device: str) -> Step:
    """Build the model and its optimizer, as the trainer does; to be called in the fake mode.

    Args:
        config: sound settings.
        place: of `take_place`.
        watch: entered here and in `Step.run`.
        memory: one of its observers.
        device: "cuda", or "cpu" for the step of a run on CPUs.
    """
    spec = TRAIN_SPECS[config.model.name]
    args = spec.model_args[config.model.flavor]
    args.update_from_config(config)
    loss_fn = spec.build_loss_fn(config)
    # A module that is not split cannot change a meta parameter for one without data.
    split = place.meshes is not None
    with torch.device("meta" if split else device):
        model: Any = spec.model_cls(args)
    converters = _converters(config, place.dims, device)
    converters.convert(model)
    schedule, is_first, is_last = None, True, True
    if place.dims.pp > 1:
        assert place.meshes is not None
        schedule, parts, is_first, is_last = schedule_stages(
            model, place.meshes, place.dims, config, torch.device(device), args, loss_fn
        )
    else:
        parts = [parallelize_part(model, place.meshes, config)]
    for part in parts:
        watch.follow(part)
    memory.follow_fsdp()
    with watch:
        if split:
            for part in parts:
                part.to_empty(device=device)
        memory.name((parameter for part in parts for parameter in part.parameters()), PARAMETERS)
        optimizers = build_optimizers(parts, config.optimizer, place.dims)
        optimizers.register_step_post_hook(lambda *_: converters.post_optimizer_hook(parts))
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    # As in the trainer: with more than one rank fully_shard casts.
    casts = not split and dtype != torch.float32
    return Step(
        parts=parts,
        schedule=schedule,
        is_first=is_first,
        is_last=is_last,
        optimizers=optimizers,
        batch=place.batch,
        loss_fn=loss_fn,
        max_norm=config.training.max_norm,
        autocast=(lambda: torch.autocast(device, dtype)) if casts else nullcontext,
        watch=watch,
        memory=memory,
        device=device,
        pp_mesh=place.pp_mesh,
        micro_batches=_micro_batches(config, place.dims),
    )


def _micro_batches(config: RunConfig, dims: ParallelDims) -> int:
    """Return those of a step that are made here."""
    training = config.training
    rows = training.local_batch_size * dims.dp_replicate * dims.dp_shard
    return min(_MOST_MICRO_BATCHES, max(1, training.global_batch_size // rows))


def _converters(config: RunConfig, dims: ParallelDims, device: str) -> Any:
    if device == "cuda":
        return build_model_converters(config, dims)
    # A CPU emulates float8, which torchtitan allows where nothing is compiled. Only shapes count here.
    compiles = config.compile.enable
    config.quantize.linear.float8.emulate, config.compile.enable = True, False
    try:
        return build_model_converters(config, dims)
    finally:
        config.compile.enable = compiles


def fake_mode() -> FakeTensorMode:
    """Return the mode in which tensors have no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)
