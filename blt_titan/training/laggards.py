"""Who holds up a run whose ranks wait for each other: a pure function of what is known of them, and how it is said.

Three ranks in two process groups. Rank 0 has begun the third collective of group x, which rank 1 has not; rank 2 has
begun the second of group y, which rank 1 has not either:

    rank 0   x: 3          waits in x
    rank 1   x: 2   y: 1   waits for nobody, is behind in both: it is the one
    rank 2          y: 2   waits in y

A rank that is behind in one group and waits in another is held up itself.
"""

from collections.abc import Collection, Iterable
from itertools import pairwise

from blt_titan.training.heartbeat import Pulse


def laggards(before: dict[int, Pulse], now: dict[int, Pulse], gone: Collection[int] = ()) -> list[int]:
    """Return the ranks that hold up the others; empty where none is behind another.

    Args:
        before: what was known of each rank, so long ago that each must have looked at itself since.
        now: what is known of them.
        gone: ranks whose processes have ended.
    """
    silent = [rank for rank, pulse in now.items() if rank in gone or before[rank].beats == pulse.beats]
    if silent:
        return sorted(silent)
    most: dict[str, int] = {}
    least: dict[str, int] = {}
    for pulse in now.values():
        for group, count in pulse.collectives.items():
            most[group] = max(most.get(group, 0), count)
            least[group] = min(least.get(group, count), count)
    behind = [
        rank
        for rank, pulse in now.items()
        if any(count < most[group] for group, count in pulse.collectives.items())
        and not any(count > least[group] for group, count in pulse.collectives.items())
    ]
    if behind:
        return sorted(behind)
    moves = {rank: pulse.moves for rank, pulse in now.items()}
    fewest = min(moves.values())
    return sorted(rank for rank in moves if moves[rank] == fewest) if max(moves.values()) > fewest else []


def where_ranks_stand(pulses: Iterable[Pulse], at: float) -> list[str]:
    """Return a line for each place and the ranks that are there, the most advanced first."""
    by_place: dict[tuple[int, int, str], list[Pulse]] = {}
    for pulse in pulses:
        by_place.setdefault((pulse.step, pulse.moves, pulse.phase), []).append(pulse)
    lines = []
    for (step, _, phase), there in sorted(by_place.items(), reverse=True):
        ranks = [pulse.rank for pulse in there]
        hosts = sorted({pulse.host for pulse in there})
        shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        begun = sorted({sum(pulse.collectives.values()) for pulse in there})
        counts = f"{begun[0]}" if len(begun) == 1 else f"{begun[0]} to {begun[-1]}"
        last = sorted({pulse.last_collective for pulse in there if pulse.last_collective})
        line = f"{named(ranks)} ({shown}): step {step}, {phase}, for {seconds_there(there, at)}"
        line += f"; {counts} collectives begun"
        lines.append(f"{line}, the last {' or '.join(last[:3])}" if last else line)
    return lines


def seconds_there(pulses: Iterable[Pulse], at: float) -> str:
    """Return how long ranks have been where they are, `at` by the clock."""
    seconds = sorted(max(0.0, at - pulse.since) for pulse in pulses)
    shortest, longest = f"{seconds[0]:.0f}", f"{seconds[-1]:.0f}"
    return f"{longest} s" if shortest == longest else f"{shortest} to {longest} s"


def named(ranks: Iterable[int]) -> str:
    """Return ranks in words.

    >>> named([3, 0, 1, 2, 7])
    'ranks 0-3, 7'
    >>> named([4])
    'rank 4'
    """
    ordered = sorted(ranks)
    first = [rank for before, rank in pairwise([-2, *ordered]) if rank != before + 1]
    last = [rank for rank, after in pairwise([*ordered, -2]) if after != rank + 1]
    parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True)]
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(parts)}"
