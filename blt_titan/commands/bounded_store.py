"""A store shared by launchers, whose answers are waited for so long and no longer.

A client of c10d's TCPStore heeds its time limit only while it waits for a key. For the answer to anything else, and
while it connects, it waits without end: where the store's machine lost its power or its process is stopped, nothing
closes the socket. It holds a lock meanwhile, and its caller, in C++, runs no signal handler. So a thread of its own
calls it here, and callers wait for that thread.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_T = TypeVar("_T")
_SLICE_S = 0.5


class SilentStoreError(RuntimeError):
    """The store gave no answer in its time."""


class BoundedStore:
    """A TCPStore whose calls end.

    Args:
        open_store: connects to it.
        open_s: seconds that may take.
        answer_s: seconds that each call may take.

    Attributes:
        answer_s: as above.

    Raises:
        SilentStoreError: it gave no answer in that time; from each method too. What it is asked may be done later.
    """

    def __init__(self, open_store: Callable[[], TCPStore], open_s: float, answer_s: float):
        self.answer_s = answer_s
        self._asked: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._caller = threading.Thread(target=self._call, name="store", daemon=True)
        self._caller.start()
        try:
            self._store = self._ask(open_store, open_s)
        except BaseException:
            self._asked.put(None)
            raise

    def close(self, seconds: float) -> None:
        """End the thread, or leave it to the end of the process if it takes longer."""
        self._asked.put(None)
        self._caller.join(seconds)

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask(lambda: self._store.set(key, value), self.answer_s)

    def get(self, key: str) -> bytes:
        """Return the value of a key that is there."""
        return self._ask(lambda: self._store.get(key), self.answer_s)

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return the sum."""
        return self._ask(lambda: self._store.add(key, amount), self.answer_s)

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""
        return self._ask(lambda: self._store.check(keys), self.answer_s)

    def compare_set(self, key: str, expected: str, value: str) -> None:
        """Set a key whose value is the expected one, "" for none."""
        self._ask(lambda: self._store.compare_set(key, expected, value), self.answer_s)

    def _ask(self, call: Callable[[], _T], seconds: float) -> _T:
        answer: Future[_T] = Future()
        self._asked.put((answer, call))
        # Slices are counted, not the clock: for this process stopped and continued, the store was silent for one.
        for _ in range(max(1, round(seconds / _SLICE_S))):
            try:
                answer.exception(_SLICE_S)
            except TimeoutError:
                continue
            return answer.result()
        answer.cancel()
        raise SilentStoreError(f"no answer for {seconds:g} s")

    def _call(self) -> None:
        while (asked := self._asked.get()) is not None:
            answer, call = asked
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(call())
                except Exception as error:
                    answer.set_exception(error)
            del asked, answer, call
