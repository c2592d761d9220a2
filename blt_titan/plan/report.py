"""A plan as lines to read."""

import math
from collections.abc import Iterator

from blt_titan.dry_run.cards import GIB
from blt_titan.dry_run.memory import GRADIENTS, OPTIMIZER, PARAMETERS
from blt_titan.dry_run.result import DryRun
from blt_titan.plan.plan import AGREEING_S, Plan
from blt_titan.plan.search import Searched

_DAY = 86_400
_LEAST_SHARE = 0.001


def report(plan: Plan) -> str:
    """Return what `blt-titan plan` prints."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_network(plan), "", *_time(plan), "", *_operation(plan)])


def _head(plan: Plan) -> Iterator[str]:
    device = plan.ranks[0].device
    yield f"{plan.name} on {plan.layout.world_size} x {plan.assumptions.gpu}: {plan.layout.name()}"
    yield (
        f"{plan.parameters / 1e9:.2f}B parameters, of which {plan.computing_parameters / 1e9:.2f}B compute; "
        f"{plan.flops_per_byte / 1e9:.2f} GFLOP a byte, forward and backward"
    )
    if device == "cpu":
        yield "memory is that of a CPU's operators: a CUDA build of torch gives the card's own"
    yield plan.text.sentence() + " (a fit: arXiv 2605.01188)"


def _memory(plan: Plan) -> Iterator[str]:
    largest, card = plan.largest, plan.card
    yield "memory of a rank      parameters  gradients  optimizer  activations and rest      peak"
    shown = {id(found): found for found in (plan.ranks[0], largest, plan.ranks[-1])}
    for found in shown.values():
        sizes = _sizes(found)
        yield f"  {_which(plan, found):<18}" + "".join(
            f"{_gib(size):>{w}}" for size, w in zip(sizes, _WIDTHS, strict=True)
        )
    room, peak = largest.room_bytes, largest.memory.peak_bytes
    beside = card.beside.bytes_of(peak)
    left = f"{_gib(room)} left" if room >= 0 else f"{_gib(-room)} TOO MUCH"
    assumed = f"{_gib(beside)} of which are assumed for what is no tensor"
    yield f"  of {_gib(card.memory_bytes)} on {card.name}, {assumed}: {left}"


_WIDTHS = (14, 11, 11, 22, 10)


def _sizes(found: DryRun) -> tuple[float, ...]:
    held = found.memory.at_peak
    states = [held.get(kind, 0) for kind in (PARAMETERS, GRADIENTS, OPTIMIZER)]
    peak = found.memory.peak_bytes
    return (*states, peak - sum(states), peak)


def _which(plan: Plan, found: DryRun) -> str:
    if len(plan.ranks) == 1:
        return "any rank"
    names = ["first"] if found is plan.ranks[0] else []
    names += ["last"] if found is plan.ranks[-1] else []
    names += ["largest"] if found is plan.largest else []
    return f"rank {found.rank} ({', '.join(names)})"


def _network(plan: Plan) -> Iterator[str]:
    network = plan.assumptions.network
    yield f"moved by a rank in one direction, in a step ({plan.micro_batches} micro-batches), on {network.name}"
    collectives = [
        (collective, collective.moved_bytes * (plan.micro_batches if collective.in_micro_batch else 1))
        for collective in plan.ranks[0].sent
    ]
    total = sum(moved for _, moved in collectives)
    if not total:
        yield "  nothing"
    for collective, moved in collectives:
        if moved < _LEAST_SHARE * total:
            continue
        seconds = network.seconds(collective) * (plan.micro_batches if collective.in_micro_batch else 1)
        where = "in a node" if network.is_inside(collective) else "between nodes"
        yield (
            f"  {moved / 1e9:9.2f} GB {seconds:8.3f} s  {collective.kind} over {collective.axis} "
            f"({collective.ranks} ranks, {where})"
        )


def _time(plan: Plan) -> Iterator[str]:
    time, source = plan.time, "the roofline's" if plan.assumptions.mfu is None else "assumed or given"
    yield f"a step of {plan.step_bytes / 1e6:.1f} MB: {time.seconds:.2f} s (predicted; nothing here is measured)"
    yield (
        f"  computing {time.compute_s:.2f} s at {time.mfu:.0%} MFU ({source}), bubble {time.bubble_s:.2f} s, network "
        f"{time.exposed_network_s:.2f} s waited for and {time.hidden_network_s:.2f} s hidden: {plan.mfu:.0%} MFU in all"
    )
    yield (
        f"  {plan.bytes_per_s / 1e6:.2f} MB/s, {plan.bytes_per_s / plan.layout.world_size / 1e3:.0f} kB/s a GPU; "
        f"loader: {plan.loader_bytes_per_s / 1e3:.0f} kB/s for each of {plan.layout.dp} groups of rows, "
        f"{plan.loader_rows_per_s:.1f} rows/s in all"
    )
    yield f"{plan.steps:,} steps: {plan.seconds / _DAY:.1f} days, {plan.gpu_hours:,.0f} GPU-hours" + _money(plan)


def _money(plan: Plan) -> str:
    price = plan.assumptions.price
    return "" if price is None else f", {plan.gpu_hours * price:,.0f} at {price:g} a GPU-hour"


def _operation(plan: Plan) -> Iterator[str]:
    saved, assumed = plan.checkpoint, plan.assumptions
    yield (
        f"checkpoint: {saved.size_bytes / 1e9:.1f} GB, stored in {saved.save_s:.0f} s at "
        f"{assumed.store_bytes_per_s / 1e9:g} GB/s a node, of which training waits {saved.blocked_s:.1f} s"
        f" ({AGREEING_S:g} s of it, for ranks to agree on it, assumed)"
    )
    failures = "no failures assumed"
    if not math.isinf(saved.between_failures_s):
        failures = f"a failure every {saved.between_failures_s / 3600:.1f} h"
    yield (
        f"  {failures}: save every {saved.interval_steps:,} steps ({saved.interval_s / 60:.0f} min), then "
        f"{saved.goodput:.1%} of the time is work that is kept"
    )
    yield "fits" if plan.fits else "does not fit"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / GIB:.2f} GiB"


def searched_report(found: Searched) -> str:
    """Return what `blt-titan plan --search` prints."""
    lines = [f"{found.tried} splits were run dry, {found.left_out} larger ones left out (--tries)"]
    lines += [f"  not possible: {sentence}" for sentence in found.said]
    if not found.best:
        return "\n".join([*lines, "no layout was found that fits"])
    for place, one in enumerate(found.best, 1):
        plan = one.plan
        lines += [
            "",
            f"{place}. {plan.layout.name()}: {plan.time.seconds:.2f} s a step, {plan.mfu:.0%} MFU, "
            f"{plan.bytes_per_s / plan.layout.world_size / 1e3:.0f} kB/s a GPU, peak "
            f"{_gib(plan.largest.memory.peak_bytes)}, {plan.seconds / _DAY:.1f} days{_money(plan)}",
            f"   computing {plan.time.compute_s:.2f} s, bubble {plan.time.bubble_s:.2f} s, network "
            f"{plan.time.exposed_network_s:.2f} s",
            "   " + " ".join(word for word in one.overrides if not word.endswith("_degree=1")),
        ]
    return "\n".join(lines)
