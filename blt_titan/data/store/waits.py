"""What a process waits for in object stores: words for whoever watches it, which change as long as it does wait.

A worker that asks a store again and again does nothing else, and would look as if it hung. So whatever waits for a
store says so every `BEAT_S` seconds: for what, for how long, in which try, and the last error. A process that is
stopped says nothing new. What goes well within a beat is not said.
"""

import os
import threading
import time
from collections.abc import Callable

BEAT_S = 0.5

_say: Callable[[str], None] | None = None
_waiting: set[int] = set()
_lock = threading.Lock()


def say_to(say: Callable[[str], None]) -> None:
    """Have `say` told what this process waits for, and "" when it waits no more; called in the process of a worker."""
    global _say
    _say = say


class Wait:
    """A wait for something in a store, which a thread makes known by its beats until it ends; a context.

    Args:
        what: is waited for, such as an address.
    """

    def __init__(self, what: str):
        self._what, self._began = what, time.monotonic()
        self.tries = 1
        self.error = ""
        """What the last try failed with."""

    def __enter__(self) -> "Wait":
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _waiting.discard(id(self))
            if _say is not None and not _waiting:
                _say("")

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._began

    def beat(self) -> None:
        """Say what is waited for, and by that that this process goes on."""
        after = f", in try {self.tries} after {self.error}" if self.error else ""
        with _lock:
            _waiting.add(id(self))
            if _say is not None:
                _say(f"it has waited for {self._what} for {self.seconds:.1f} s{after}")

    def sleep(self, seconds: float) -> None:
        """Pause, and beat meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.beat()
            time.sleep(min(left, BEAT_S))


def _begin_anew() -> None:
    global _lock
    _lock = threading.Lock()  # which a thread may have held when its process was forked
    _waiting.clear()


os.register_at_fork(after_in_child=_begin_anew)
