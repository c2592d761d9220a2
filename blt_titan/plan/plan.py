"""A plan: memory and collectives from dry runs of the run's own code, times and money by arithmetic on them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from blt_titan.config.check import check_run
from blt_titan.config.rules.target import CARD
from blt_titan.config.run_config import RunConfig
from blt_titan.dry_run.cards import CARDS, Card
from blt_titan.dry_run.result import DryRun
from blt_titan.dry_run.run import dry_run
from blt_titan.plan.as_json import finite_or_none
from blt_titan.plan.compute_optimal import TextForSize
from blt_titan.plan.layout import Layout, args_of, compute_of, layout_of, mean_patch_bytes, measured_ranks, step_bytes
from blt_titan.plan.network import Network
from blt_titan.plan.reliability import best_interval, goodput, mean_time_between_failures
from blt_titan.plan.time import StepTime, step_time
from blt_titan.training.spec import TRAIN_SPECS

ASSUMED_MFU = 0.40
"""Reached by computing alone, where nothing else is said: what good dense training does, not measured here."""
_STAGING_BYTES_PER_S = 20e9
"""From a GPU to its host's memory, which an asynchronous save holds up."""
AGREEING_S = 1.0
"""What ranks take to say what each saves, which one of them puts together; assumed, and held up in any case."""
_STATES = 3
"""A parameter and Adam's two moments."""
_FLOAT = 4


@dataclass(frozen=True)
class Assumptions:
    """What a plan is told, or assumes."""

    gpu: str
    network: Network
    mfu: float | None = ASSUMED_MFU
    """None takes the roofline's."""
    price: float | None = None
    """What a GPU costs for an hour."""
    store_bytes_per_s: float = 2e9
    """What a node writes to where checkpoints are kept."""
    failures_per_gpu_hour: float = 0.0
    restart_s: float = 300.0
    """From a failure to the next step."""


@dataclass(frozen=True)
class Checkpoint:
    """What saving costs."""

    size_bytes: int
    save_s: float
    """Until it is stored."""
    blocked_s: float
    """The part of that which training waits for."""
    is_async: bool
    """Training goes on while it is stored."""
    between_failures_s: float
    interval_s: float
    """Seconds of work between two saves that waste least."""
    interval_steps: int
    goodput: float
    """At that interval."""


@dataclass(frozen=True)
class Plan:
    """What a run takes, and what it comes to."""

    name: str
    layout: Layout
    ranks: list[DryRun]
    """By rank: the first, the last and, where they differ, others between."""
    parameters: int
    computing_parameters: int
    """Without hash tables."""
    flops_per_byte: float
    """Forward and backward."""
    step_bytes: int
    steps: int
    micro_batches: int
    """Rounds of gradient accumulation in a step."""
    time: StepTime
    checkpoint: Checkpoint
    text: TextForSize
    loader_bytes_per_s: float
    """Text that a group of ranks which share rows takes."""
    loader_rows_per_s: float
    """Rows that the whole job takes."""
    assumptions: Assumptions

    @property
    def card(self) -> Card:
        """Return the card."""
        return CARDS[self.assumptions.gpu]

    @property
    def largest(self) -> DryRun:
        """Return the rank whose peak is highest."""
        return max(self.ranks, key=lambda found: found.memory.peak_bytes)

    @property
    def fits(self) -> bool:
        """Tell whether the largest rank fits the card."""
        return self.largest.room_bytes >= 0

    @property
    def bytes_per_s(self) -> float:
        """Return the job's rate between failures and saves."""
        return self.step_bytes / self.time.seconds

    @property
    def seconds(self) -> float:
        """Return the time of the whole run, saves and failures included."""
        kept = self.checkpoint.goodput
        return self.steps * self.time.seconds / kept if kept else math.inf

    @property
    def gpu_hours(self) -> float:
        """Return the GPU-hours of the whole run."""
        return self.seconds / 3600 * self.layout.world_size

    @property
    def mfu(self) -> float:
        """Return the share of the GPUs' dense bf16 figure that a whole step takes."""
        used = self.flops_per_byte * self.step_bytes
        return used / (self.time.seconds * self.layout.world_size * self.card.bf16_flops)

    def to_json(self) -> dict[str, Any]:
        """Return all of it, as JSON takes it; what has no end is None."""
        figures = {name: getattr(self, name) for name in ("fits", "bytes_per_s", "seconds", "gpu_hours", "mfu")}
        money = None if self.assumptions.price is None else self.gpu_hours * self.assumptions.price
        said = asdict(self) | figures | {"text": asdict(self.text) | {"says": self.text.sentence()}, "money": money}
        return finite_or_none(said)


Measure = Callable[..., DryRun]


def make_plan(
    config: RunConfig,
    world_size: int,
    assumptions: Assumptions,
    *,
    name: str,
    device: str | None = None,
    quiet: bool = False,
    measure: Measure = dry_run,
) -> Plan:
    """Plan a run.

    Args:
        config: its settings, as `load_run_config` returns them.
        world_size: ranks of the whole job.
        assumptions: about cards, network and prices.
        name: what it is called.
        device: whose operators the dry runs take; None for "cuda" where this torch is a CUDA build, else "cpu".
        quiet: say nothing on standard error.
        measure: makes a dry run.

    Raises:
        RunConfigError: the settings are not sound on so many ranks.
        DryRunError: the step cannot be made here.
    """
    check_run(config, world_size=world_size, verify_data=False, look_at_disk=False, target=CARD)
    layout, args = layout_of(config, world_size), args_of(config)
    device = device or ("cuda" if torch.version.cuda is not None else "cpu")
    roofline = assumptions.mfu is None
    ranks = [
        measure(config, world_size, assumptions.gpu, name=name, kernels=roofline, quiet=quiet, rank=rank, device=device)
        for rank in measured_ranks(layout)
    ]
    compute = compute_of(config, layout)
    card = CARDS[assumptions.gpu]
    mfu = min(found.roofline.mfu for found in ranks if found.roofline) if roofline else assumptions.mfu
    assert mfu is not None
    time = max(
        (step_time(compute, found.sent, assumptions.network, flops_per_s=card.bf16_flops, mfu=mfu) for found in ranks),
        key=lambda step: step.seconds,
    )
    parameters, tables = count_parameters(config)
    n_bytes = step_bytes(config, layout)
    rate = n_bytes / time.seconds
    patch_bytes = mean_patch_bytes(config)
    return Plan(
        name=name,
        layout=layout,
        ranks=ranks,
        parameters=parameters,
        computing_parameters=parameters - tables,
        flops_per_byte=3 * args.forward_flops_per_byte(config.training.seq_len, patch_bytes),
        step_bytes=n_bytes,
        steps=config.training.steps,
        micro_batches=compute.micro_batches,
        time=time,
        checkpoint=checkpoint_of(config, layout, parameters, time.seconds, assumptions),
        text=TextForSize(float(n_bytes) * config.training.steps, parameters - tables),
        loader_bytes_per_s=rate / layout.dp,
        loader_rows_per_s=rate / config.training.seq_len,
        assumptions=assumptions,
    )


def count_parameters(config: RunConfig) -> tuple[int, int]:
    """Return the parameters of the whole model, and those of its hash tables."""
    with torch.device("meta"):
        make: Any = TRAIN_SPECS[config.model.name].model_cls
        model = make(args_of(config))
    tables = getattr(model, "hash_embedding", None)
    in_tables = 0 if tables is None else sum(parameter.numel() for parameter in tables.parameters())
    return sum(parameter.numel() for parameter in model.parameters()), in_tables


def checkpoint_of(
    config: RunConfig, layout: Layout, parameters: int, step_s: float, assumptions: Assumptions
) -> Checkpoint:
    """Return what saving costs a run whose steps take `step_s`."""
    size = parameters * _STATES * _FLOAT
    nodes = max(1, -(-layout.world_size // assumptions.network.node_gpus))
    save = AGREEING_S + size / (assumptions.store_bytes_per_s * nodes)
    is_async = config.checkpoint.async_mode != "disabled"
    # Each rank copies its whole part, though of replicas one writes it.
    part = size * layout.replicas / layout.world_size
    blocked = AGREEING_S + part / _STAGING_BYTES_PER_S if is_async else save
    between = mean_time_between_failures(layout.world_size, assumptions.failures_per_gpu_hour)
    run_s = config.training.steps * step_s
    # No asynchronous save begins before the one before it has ended.
    interval = min(max(best_interval(blocked, between), save if is_async else 0.0, step_s), run_s)
    return Checkpoint(
        size_bytes=size,
        save_s=save,
        blocked_s=blocked,
        is_async=is_async,
        between_failures_s=between,
        interval_s=interval,
        interval_steps=max(1, round(interval / step_s)),
        goodput=goodput(interval, blocked, assumptions.restart_s, between, lost_behind_s=max(0.0, save - blocked)),
    )
