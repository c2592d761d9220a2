"""Heartbeats of the other ranks: mapped where they are on this node, over the store of the process group otherwise.

The store is asked in a thread of its own: its server is a launcher or rank 0, and where that is stopped nobody gets an
answer. That it does not answer is then what is known; rank 0's last heartbeat is kept for that case.

One store serves all ranks, so what they ask of it together is bounded: heartbeats travel without stacks, which are a
key of their own that only a report asks for, and each rank asks for so many others in a beat that all get answers.
"""

import contextlib
import math
import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from blt_titan.training.heartbeat import NeighbourHeartbeat, Pulse, process_state

_STORE_READS_PER_S = 50_000
"""Heartbeats that all ranks together ask the store for; it was measured to give 120,000 to 170,000."""
_AT_ONCE = 64
"""Heartbeats of one request."""


class Peers:
    """What is known of all ranks.

    Args:
        rank: this one.
        world_size: ranks.
        beat_s: seconds between two messages to the store.
    """

    def __init__(self, rank: int, world_size: int, beat_s: float):
        self.rank, self.world_size, self._beat_s = rank, world_size, beat_s
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.node = range(rank - local_rank, min(rank - local_rank + of_node, world_size))
        """Ranks of this node."""
        self._neighbours: dict[int, NeighbourHeartbeat] = {}
        self.round_s = max(beat_s, world_size**2 / _STORE_READS_PER_S)
        """Seconds in which all other ranks are asked for once."""
        self._in_a_beat = math.ceil(world_size * beat_s / self.round_s)
        self.rounds = 0
        """How often all of other nodes were asked for."""
        self.rounds_before = 0
        """The same when that was begun last."""
        self._left: list[int] = []
        self._told: dict[int, Pulse] = {}
        self._told_stack = ""
        self._own: Pulse | None = None
        self._want_all = False
        self._answered = time.monotonic()
        self._stop = threading.Event()
        self._store = cast(Any, dist.distributed_c10d._get_default_store()).clone()
        self._store.set_timeout(timedelta(seconds=max(2 * beat_s, 1.0)))
        self._thread = threading.Thread(target=self._exchange, name="heartbeats", daemon=True)

    def begin(self, own: Pulse) -> None:
        """Begin to tell others."""
        self._own = own
        self._thread.start()

    def end(self) -> None:
        """Tell nobody any more."""
        self._stop.set()
        self._thread.join(1.0)

    def tell(self, own: Pulse) -> None:
        """Have `own` told to others soon."""
        self._own = own

    def ask(self, all_ranks: bool) -> None:
        """Have all ranks asked for from now on, or rank 0 alone."""
        if all_ranks and not self._want_all:
            self.rounds_before = self.rounds
        self._want_all = all_ranks

    @property
    def store_silent_s(self) -> float:
        """Since when the store has not answered."""
        return time.monotonic() - self._answered

    def read(self) -> dict[int, Pulse]:
        """Return what is known of each rank by now, in order; of none that has not been heard of."""
        assert self._own is not None
        known = dict(self._told)
        for rank in self.node:
            if rank in self._neighbours:
                known[rank] = self._neighbours[rank].read()
        known[self.rank] = self._own
        return {rank: Pulse.from_json(known[rank].to_json()) for rank in sorted(known)}

    def gone(self) -> list[int]:
        """Return the ranks of this node whose processes have ended."""
        return [rank for rank, other in self._neighbours.items() if not process_state(other.read().pid)]

    def stack_of(self, rank: int) -> str:
        """Ask the store for the stack that a rank of another node told; "" if it told none or there is no answer."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_stack_key(rank)]):
                return self._store.get(_stack_key(rank)).decode(errors="replace")
        return ""

    def _exchange(self) -> None:
        while True:
            with contextlib.suppress(RuntimeError):  # of a store that does not answer; `store_silent_s` tells
                self._exchange_once()
            if self._stop.wait(self._beat_s):
                return

    def _exchange_once(self) -> None:
        own = self._own
        assert own is not None
        others = set(range(self.world_size)) - self._neighbours.keys() - {self.rank}
        if not others:
            self.rounds += 1
        self._store.set(_key(self.rank), replace(own, stack="").to_json())
        self._store.check([_key(self.rank)])
        self._answered = time.monotonic()
        if own.stack != self._told_stack:
            self._store.set(_stack_key(self.rank), own.stack.encode())
            self._told_stack = own.stack
        first = {0, *(rank for rank in self.node if rank not in self._neighbours)} - {self.rank}
        self._ask_store(sorted(first))
        if others and self._want_all:
            self._left = self._left or sorted(others - first)
            asked = self._left[: self._in_a_beat]
            self._ask_store(asked)
            self._left = self._left[len(asked) :]
            self.rounds += not self._left

    def _ask_store(self, ranks: list[int]) -> None:
        for at in range(0, len(ranks), _AT_ONCE):
            part = ranks[at : at + _AT_ONCE]
            new = [rank for rank in part if rank not in self._told]
            if new and not self._store.check([_key(rank) for rank in new]):  # some have not begun
                absent = {rank for rank in new if not self._store.check([_key(rank)])}
                part = [rank for rank in part if rank not in absent]
            for said in self._store.multi_get([_key(rank) for rank in part]) if part else []:
                self._hear(Pulse.from_json(said))
            self._answered = time.monotonic()

    def _hear(self, pulse: Pulse) -> None:
        if pulse.rank in self.node and pulse.page >= 0 and pulse.rank not in self._neighbours:
            with contextlib.suppress(OSError):  # ended since, or not to be looked at: then over the store
                self._neighbours[pulse.rank] = NeighbourHeartbeat(pulse)
        self._told[pulse.rank] = pulse


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _stack_key(rank: int) -> str:
    return f"heartbeat/{rank}/stack"
