"""Record batches that are read before their streams ask for them: threads, where each read is a request to a store.

In: which record batch is due when, as far as it can be foretold. Out: what was read, when it is asked for.

    due     row  12: stream 3's pick 8     row 15: stream 0's pick 9     row 90: stream 7's pick 8
    ahead   2 of them are being read, or wait; as one is taken, the next that is due is begun

The decision that is not obvious: what comes next is foretold, not known, as a row takes more or less of its stream.
What was foretold too late is read when it is asked for, so that rows are the same whatever is read ahead; and memory is
bounded, as no more than `ahead` of them are held.
"""

import heapq
import queue
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Calls `read` in threads for what is due next.

    The threads end with the process, and nothing waits for them: a request that hangs holds up no exit.

    Args:
        read: reads what a key names; threads call it.
        ahead: the most that are being read, or are held; 0 reads everything when it is asked for.
    """

    def __init__(self, read: Callable[[Any], T], ahead: int):
        self._read = read
        self._ahead = ahead
        self._due: list[tuple[float, int, Hashable]] = []
        self._waiting: set[Hashable] = set()
        self._begun: dict[Hashable, Future[T]] = {}
        self._order = 0
        self._jobs: queue.SimpleQueue[tuple[Future[T], Hashable] | None] = queue.SimpleQueue()
        self._threads = 0

    def expect(self, key: Hashable, due: float) -> None:
        """Say that a key will be asked for, and when: anything that rises."""
        if self._ahead and key not in self._waiting and key not in self._begun:
            self._order += 1
            heapq.heappush(self._due, (due, self._order, key))
            self._waiting.add(key)
            self._begin()

    def take(self, key: Hashable) -> T:
        """Return what a key names, read by now or not; raises what `read` raised."""
        self._waiting.discard(key)
        future = self._begun.pop(key, None)
        self._begin()
        return self._read(key) if future is None else future.result()

    def close(self) -> None:
        """Begin no more."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self._ahead = 0

    def _begin(self) -> None:
        while self._due and len(self._begun) < self._ahead:
            _, _, key = heapq.heappop(self._due)
            if key not in self._waiting:
                continue  # it was asked for first
            self._waiting.remove(key)
            self._begun[key] = Future()
            self._jobs.put((self._begun[key], key))
            if self._threads < len(self._begun):
                self._threads += 1
                threading.Thread(target=self._work, name="read-ahead", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, key = job
            try:
                future.set_result(self._read(key))
            except BaseException as error:
                future.set_exception(error)
            del job, future  # which would keep what was read until the next job
