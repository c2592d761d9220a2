"""Heartbeats of the other ranks: mapped where they are on this node, over the store of the process group otherwise.

The store is asked in a thread of its own: its server is a launcher or rank 0, and where that is stopped nobody gets an
answer. That it does not answer is then what is known; rank 0's last heartbeat is kept for that case.
"""

import contextlib
import os
import threading
import time
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from blt_titan.training.heartbeat import NeighbourHeartbeat, Pulse, process_state


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
        self._told: dict[int, Pulse] = {}
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

    def _exchange(self) -> None:
        while True:
            with contextlib.suppress(RuntimeError):  # of a store that does not answer; `store_silent_s` tells
                self._exchange_once()
                self._answered = time.monotonic()
            if self._stop.wait(self._beat_s):
                return

    def _exchange_once(self) -> None:
        assert self._own is not None
        self._store.set(_key(self.rank), self._own.to_json())
        wanted = {0, *(rank for rank in self.node if rank not in self._neighbours)}
        if self._want_all:
            wanted |= set(range(self.world_size)) - self._neighbours.keys()
        keys = [_key(rank) for rank in sorted(wanted - {self.rank})]
        if not keys:
            self._store.check([_key(self.rank)])
            return
        if not self._store.check(keys):  # some have not begun
            keys = [key for key in keys if self._store.check([key])]
        for said in self._store.multi_get(keys) if keys else []:
            pulse = Pulse.from_json(said)
            self._told[pulse.rank] = pulse
            if pulse.rank in self.node and pulse.page >= 0 and pulse.rank not in self._neighbours:
                with contextlib.suppress(OSError):  # ended since, or not to be looked at: then over the store
                    self._neighbours[pulse.rank] = NeighbourHeartbeat(pulse)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
