"""A training step as a run makes it, on one device: the run's settings and code, a shape of one's own, made-up rows.

The model is split by `parallelize_part`; on a mesh of one rank too, so that FSDP2 and the exchange of the hash tables
do what they do on many. Weights are random numbers of the right size, drawn on the device: only time and memory count.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import blt_titan
from blt_titan.batch import Batch
from blt_titan.bench.rows import Work, draw_rows
from blt_titan.config.read import load_run_config
from blt_titan.config.run_config import RunConfig
from blt_titan.gpu_check.stage import Place, wait
from blt_titan.loss import ByteCrossEntropy
from blt_titan.model.args import BLTArgs
from blt_titan.model.blt import BLT
from blt_titan.titan import TORCH_DTYPE_MAP, ParallelDims, build_model_converters, build_optimizers, get_peak_flops
from parallelisms.clipping import clip_grad_norm
from parallelisms.hash_tables import reduce_partial_gradients
from parallelisms.meshes import build_meshes
from parallelisms.parallelize import parallelize_part

CONFIGS = Path(blt_titan.__file__).parent / "train_configs"
_STD = 0.02


@dataclass(frozen=True)
class StepPlan:
    """What a step is of."""

    args: BLTArgs
    work: Work
    config: str = "blt_1b"
    """A shipped TOML."""
    overrides: tuple[str, ...] = ()
    """Settings that are not those of the TOML."""
    mesh_of_one: bool = True
    """FSDP2 and the exchange of the hash tables, on one rank."""
    micro_batches: int = 1


@dataclass
class TrainingStep:
    """A model with its optimizer and rows."""

    model: Any
    optimizers: Any
    batch: Batch
    plan: StepPlan
    max_norm: float
    autocast: Callable[[], AbstractContextManager[Any]]

    def run(self) -> torch.Tensor:
        """Make a step; return the loss of its last micro-batch, on the device."""
        loss_fn, plan = ByteCrossEntropy(), self.plan
        loss = torch.zeros(())
        with loss_fn.step(float(plan.work.total_bytes * plan.micro_batches)):
            for _ in range(plan.micro_batches):
                with self.autocast():
                    loss = loss_fn(self.model(self.batch.ids_BS, self.batch.layout), self.batch.labels_BS)
                loss.backward()
        parameters = list(self.model.parameters())
        reduce_partial_gradients(parameters)
        clip_grad_norm(parameters, self.max_norm, pp_mesh=None)
        self.optimizers.step()
        self.optimizers.zero_grad()
        return loss.detach()


def plan_config(plan: StepPlan, place: Place) -> RunConfig:
    """Return a plan's settings."""
    overrides = list(plan.overrides)
    if not place.is_cuda:
        overrides.append("--optimizer.implementation=for-loop")
    return load_run_config([f"--job.config_file={CONFIGS / plan.config}.toml", *overrides])


@contextmanager
def rank_alone(place: Place) -> Iterator[None]:
    """Make this process a group of one rank, on a port of its own."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if place.is_cuda else "gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_step(plan: StepPlan, place: Place) -> TrainingStep:
    """Build the model and its optimizer; within `rank_alone`."""
    config = plan_config(plan, place)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    with torch.device("meta"):
        model: Any = BLT(plan.args)
    converters = build_model_converters(config, dims)
    converters.convert(model)
    model = parallelize_part(model, build_meshes(dims) if plan.mesh_of_one else None, config)
    model.to_empty(device=place.device)
    _fill(model)
    optimizers = build_optimizers([model], config.optimizer, dims)
    optimizers.register_step_post_hook(lambda *_: converters.post_optimizer_hook([model]))
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    # As in the trainer: on a mesh fully_shard casts.
    casts = not plan.mesh_of_one and dtype != torch.float32
    batch = draw_rows(plan.work).batch.to(place.device)
    autocast = partial(torch.autocast, torch.device(place.device).type, dtype) if casts else nullcontext
    return TrainingStep(model, optimizers, batch, plan, config.training.max_norm, autocast)


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            local.fill_(1.0)
        else:
            local.normal_(std=_STD)


def measure_step(plan: StepPlan, place: Place) -> dict[str, Any]:
    """Build and measure a step.

    Returns:
        `seconds` of each step and `median_s`, `warm_up_s` (of building, compiling and the first steps), bytes a second,
        `mfu` where the card's peak is known, `peak_bytes` of tensors on a GPU, and the first and last loss.
    """
    warm_ups, repeats = (1, 2) if place.tiny else (3, 10)
    began = time.perf_counter()
    step = build_step(plan, place)
    first = float(step.run())
    for _ in range(warm_ups - 1):
        step.run()
    wait(place)
    warm_up_s = time.perf_counter() - began
    if place.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, last = [], first
    for _ in range(repeats):
        began = time.perf_counter()
        loss = step.run()
        wait(place)
        seconds.append(time.perf_counter() - began)
        last = float(loss)
    if not last < float("inf"):
        raise RuntimeError(f"the loss is {last} after {warm_ups + repeats} steps; it began at {first}")
    return rates(seconds, plan, place) | {"warm_up_s": warm_up_s, "loss_first": first, "loss_last": last}


def rates(seconds: Sequence[float], plan: StepPlan, place: Place) -> dict[str, Any]:
    """Return the figures of measured steps."""
    work, median_s = plan.work, statistics.median(seconds)
    bytes_per_s = work.total_bytes * plan.micro_batches / median_s
    flops_per_byte = 3 * plan.args.forward_flops_per_byte(work.n_bytes, work.patch_bytes)
    figures: dict[str, Any] = {
        "seconds": list(seconds),
        "median_s": median_s,
        "bytes_per_s": bytes_per_s,
        "flops_per_byte": flops_per_byte,
        "row_bytes": work.n_bytes,
        "patch_bytes": work.patch_bytes,
        "patch_slots": work.patch_slots,
    }
    if place.is_cuda:
        figures["mfu"] = bytes_per_s * flops_per_byte / get_peak_flops(torch.cuda.get_device_name())
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return figures
