"""The layouts of a run on so many GPUs that would be fastest and fit, by predicted time.

What is tried: degrees of pipeline, tensor and context parallelism that divide the ranks, tensor parallelism inside a
node only; copies of the weights in each node (`replicas`) beside one copy over all; activation checkpointing; rows of a
micro-batch. The global batch and the row stay what they are.

Each split is run once, dry, with one row and nothing checkpointed; memory and traffic of more rows follow from that,
since both are a part that weights bring and a part that rows bring. Splits are tried from the smallest product of
degrees, because a larger one only adds traffic; after `tries` of them the rest is left out, and said. The best few are
run dry as they are before they are shown.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from blt_titan.config.check import RunConfigError
from blt_titan.config.rules.sound import sound
from blt_titan.config.rules.target import CARD
from blt_titan.config.run_config import RunConfig
from blt_titan.dry_run.cards import CARDS
from blt_titan.dry_run.errors import DryRunError
from blt_titan.dry_run.memory import GRADIENTS, OPTIMIZER, PARAMETERS
from blt_titan.dry_run.run import dry_run
from blt_titan.plan.layout import compute_of, layout_of
from blt_titan.plan.plan import Assumptions, Measure, Plan, make_plan
from blt_titan.plan.time import HIDDEN_AXES, WITHIN_KINDS, step_time

_STATES = (PARAMETERS, GRADIENTS, OPTIMIZER)
DEGREES = (1, 2, 4, 8)
ROWS = (1, 2, 4)
_ONE_ROW = "--training.local_batch_size=1"
CHECKPOINTING = (
    ("--activation_checkpoint.mode=none",),
    ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
    ("--activation_checkpoint.mode=full",),
)

Read = Callable[[Sequence[str]], RunConfig]
"""Reads the run's settings with these overrides."""


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    overrides: list[str]
    plan: Plan


@dataclass(frozen=True)
class Searched:
    """What a search gives."""

    best: list[Found]
    """Fastest first."""
    tried: int
    """Splits that were run dry."""
    left_out: int
    """Splits that were not."""
    said: list[str]
    """Why a split could not be run, a sentence each."""


@dataclass(frozen=True)
class _Candidate:
    overrides: tuple[str, ...]
    seconds: float
    """Predicted time of a step."""


def splits(read: Read, world_size: int, node_gpus: int) -> list[tuple[str, ...]]:
    """Return the overrides of all splits whose settings are sound on so many ranks, smallest first.

    Raises:
        RunConfigError: there is none; says what is wrong with the settings in every split, else in the smallest.
    """
    ways = _ways(world_size, node_gpus)
    possible = [overrides for overrides in ways if _rows_of(read, overrides, world_size) is not None]
    if possible:
        return possible
    wrong = [list(sound(read([*overrides, _ONE_ROW]), world_size, CARD)) for overrides in ways]
    in_all = [sentence for sentence in wrong[0] if all(sentence in faults for faults in wrong)]
    raise RunConfigError(*(in_all or wrong[0]))


def _ways(world_size: int, node_gpus: int) -> list[tuple[str, ...]]:
    """Return the overrides of all splits of so many ranks, smallest first."""
    found = []
    for pp, tp, cp in itertools.product(DEGREES, DEGREES, DEGREES):
        if tp > node_gpus or world_size % (pp * tp * cp):
            continue
        rest = world_size // (pp * tp * cp)
        copies = {1, max(1, rest * tp * cp // node_gpus)} if rest > 1 else {1}
        for replicas in sorted(copies):
            if rest % replicas:
                continue
            overrides = (
                f"--parallelism.pipeline_parallel_degree={pp}",
                f"--parallelism.tensor_parallel_degree={tp}",
                f"--parallelism.context_parallel_degree={cp}",
                f"--parallelism.data_parallel_replicate_degree={replicas}",
                f"--parallelism.data_parallel_shard_degree={rest // replicas}",
            )
            found.append((pp * tp * cp, replicas, overrides))
    return [overrides for _, _, overrides in sorted(found)]


def search(
    read: Read,
    world_size: int,
    assumptions: Assumptions,
    *,
    name: str,
    tries: int = 8,
    shown: int = 3,
    device: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    measure: Measure = dry_run,
) -> Searched:
    """Search for layouts.

    Args:
        read: reads the run's settings.
        world_size: ranks of the whole job.
        assumptions: as of a plan.
        name: what the run is called.
        tries: splits to run dry.
        shown: layouts to return.
        device: as in `make_plan`.
        say: is told of progress.
        measure: makes a dry run.

    Raises:
        RunConfigError: the settings are not sound in any split.
    """

    def planned(overrides: Sequence[str]) -> Plan:
        config = read(overrides)
        return make_plan(config, world_size, assumptions, name=name, device=device, quiet=True, measure=measure)

    possible = splits(read, world_size, assumptions.network.node_gpus)
    candidates: list[_Candidate] = []
    said: list[str] = []
    for number, split in enumerate(possible[:tries], 1):
        say(f"split {number} of {min(tries, len(possible))}: {_short(split)}")
        for checkpointing in CHECKPOINTING:
            overrides = (*split, *checkpointing)
            rows = _rows_of(read, overrides, world_size)
            if rows is None:
                continue
            try:
                one = planned([*overrides, *rows])
            except (DryRunError, RunConfigError) as error:
                said.append(f"{_short(overrides)}: {error}")
                break
            fitting = list(_with_rows(read, one, overrides, world_size))
            candidates += fitting
            if fitting:
                break  # more checkpointing computes more
    candidates.sort(key=lambda candidate: candidate.seconds)
    best: list[Found] = []
    for candidate in candidates:
        if len(best) == shown:
            break
        say(f"checking {_short(candidate.overrides)}")
        plan = planned(candidate.overrides)
        if plan.fits:
            best.append(Found(list(candidate.overrides), plan))
    best.sort(key=lambda found: found.plan.time.seconds)
    return Searched(best, min(tries, len(possible)), max(0, len(possible) - tries), said)


def _rows_of(read: Read, overrides: Sequence[str], world_size: int) -> tuple[str, ...] | None:
    """Return the override of the fewest rows with which a layout's settings are sound; None if there are none."""
    for rows in (1, 2, 4, 8, 16, 32):
        override = (f"--training.local_batch_size={rows}",)
        if not sound(read([*overrides, *override]), world_size, CARD):
            return override
    return None


def _with_rows(read: Read, one: Plan, overrides: tuple[str, ...], world_size: int) -> Iterator[_Candidate]:
    """Yield the numbers of rows that would fit, by what the plan of the fewest says."""
    found, card = one.largest, CARDS[one.assumptions.gpu]
    states = sum(found.memory.at_peak.get(kind, 0) for kind in _STATES)
    by_rows = found.memory.peak_bytes - states
    base = int(read([*overrides, *(_rows_of(read, overrides, world_size) or ())]).training.local_batch_size)
    # A pipeline cuts more rows into more micro-batches, of which it holds no more at once.
    grows = layout_of(read(overrides), world_size).pp == 1
    for times in ROWS:
        peak = states + by_rows * (times if grows else 1)
        if peak + card.beside.bytes_of(peak) > card.memory_bytes:
            return
        changed = (*overrides, f"--training.local_batch_size={base * times}")
        config = read(changed)
        if sound(config, world_size, CARD):
            continue
        sent = [
            collective
            if collective.axis in HIDDEN_AXES and collective.kind not in WITHIN_KINDS
            else replace(collective, moved_bytes=collective.moved_bytes * (times if collective.in_micro_batch else 1))
            for collective in found.sent
        ]
        compute = compute_of(config, layout_of(config, world_size))
        time = step_time(compute, sent, one.assumptions.network, flops_per_s=card.bf16_flops, mfu=one.time.mfu)
        yield _Candidate(changed, time.seconds)


def _short(overrides: Sequence[str]) -> str:
    """Return what overrides change, without the sections and what is 1."""
    said = (override.removeprefix("--").partition(".")[2] for override in overrides)
    return " ".join(word for word in said if not word.endswith("_degree=1"))
