"""A rank's heartbeat: where its training is, written so that others can read it when the rank itself answers no more.

The training writes its place (step, phase, when) into a page of memory, which costs about a microsecond and waits for
nothing. A thread beside it (`hang_watch.py`) adds once in a while what it sees from outside: how long nothing has
moved, how many collectives were begun, where the main thread is. Processes of the same machine map the page, through
`/proc/<pid>/fd`: it needs no file, outlives the process for those who hold it, and is exact also where a rank was
stopped between two beats. Other machines are told over the store of the process group (`peers.py`).
"""

import contextlib
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

PHASES = (
    *("start", "load", "data", "forward/backward", "reduce", "optimizer", "log"),
    *("save", "validate", "exports", "end"),
)
LONG_PHASES = frozenset(("start", "load", "save", "validate", "end"))
"""Phases that may take long although nothing is wrong."""
UNWATCHED_PHASES = frozenset(("exports",))
"""Phases in which all ranks wait, as long as it takes, for what another process does."""
_PLACE = struct.Struct("<qqqd")
_SEEN_AT = 64
_SEEN = struct.Struct("<II")
_PAGE_BYTES = 32768

Item = TypeVar("Item")


class Place(NamedTuple):
    """Where the training of a rank is."""

    step: int
    moves: int
    """Phases begun; the same on all ranks that are at the same place."""
    phase: str
    since: float
    """When it began, in seconds of the clock (`time.time`)."""


@dataclass
class Pulse:
    """What is known of a rank."""

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = "start"
    moves: int = 0
    since: float = 0.0
    beats: int = 0
    """How often the thread beside the training has looked; of a process that is stopped they stand still."""
    idle_s: float = 0.0
    """Since when nothing has moved, as far as it has seen."""
    limit_s: float | None = None
    """How long nothing may move in this phase."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Collectives begun, by process group and its first rank."""
    last_collective: str = ""
    stack: str = ""
    """Where the main thread is, once nothing has moved for a while."""
    page: int = -1
    """The descriptor of its heartbeat's memory."""
    stacks: int = -1
    """The descriptor that SIGUSR2 writes the stacks of all its threads to."""

    def to_json(self) -> bytes:
        """Return it as bytes."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, said: bytes | str) -> "Pulse":
        """Return what `to_json` wrote."""
        return cls(**json.loads(said))


class Heartbeat:
    """What the training of this rank says of itself."""

    def __init__(self):
        self.descriptor = memory_file("heartbeat")
        self._memory = mmap.mmap(self.descriptor, _PAGE_BYTES)
        self._step = self._moves = 0
        self.warm = False
        """The first step is made: what is compiled or connected at first use is."""
        self.at("start")

    def at(self, phase: str, step: int | None = None) -> None:
        """Say that `phase` begins, of this step or of the one before."""
        self._step = self._step if step is None else step
        self._moves += 1
        _PLACE.pack_into(self._memory, 0, self._step, self._moves, PHASES.index(phase), time.time())

    def each(self, items: Iterable[Item], phase: str) -> Iterator[Item]:
        """Yield `items`, each of them a sign of life in `phase`."""
        for item in items:
            self.at(phase)
            yield item

    @property
    def place(self) -> Place:
        """Where the training is."""
        return _place(self._memory)

    def write_seen(self, pulse: Pulse) -> None:
        """Write what was seen from outside."""
        said = pulse.to_json()
        if len(said) > _PAGE_BYTES - _SEEN_AT - _SEEN.size:
            return
        begin = _SEEN_AT + _SEEN.size
        self._memory[begin : begin + len(said)] = said
        _SEEN.pack_into(self._memory, _SEEN_AT, len(said), zlib.crc32(said))


class NeighbourHeartbeat:
    """The heartbeat of another process of this machine, readable also after its end.

    Raises:
        OSError: there is no such process, or it may not be looked at.
    """

    def __init__(self, pulse: Pulse):
        with open(f"/proc/{pulse.pid}/fd/{pulse.page}", "rb") as page:
            self._memory = mmap.mmap(page.fileno(), _PAGE_BYTES, prot=mmap.PROT_READ)
        self._last = pulse

    def read(self) -> Pulse:
        """Return where the rank is now, and what it last saw of itself."""
        for _ in range(3):
            length, crc32 = _SEEN.unpack_from(self._memory, _SEEN_AT)
            begin = _SEEN_AT + _SEEN.size
            said = self._memory[begin : begin + length]
            if length and zlib.crc32(said) == crc32:
                self._last = Pulse.from_json(said)
                break
            time.sleep(0.001)  # it was being written
        place = _place(self._memory)
        self._last.step, self._last.moves, self._last.phase, self._last.since = place
        return self._last


def memory_file(name: str) -> int:
    """Return the descriptor of a file in memory that ends with those who hold it; -1 where there is none."""
    if not hasattr(os, "memfd_create"):
        return -1
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, _PAGE_BYTES if name == "heartbeat" else 0)
    return descriptor


def process_state(pid: int) -> str:
    """Return the state of a process as the kernel has it, one letter; "" if it is gone or cannot be asked.

    R runs, S sleeps, D waits for a disk or a mount, T is stopped.
    """
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state in ("Z", "X") else state
    return ""


def _place(memory: Any) -> Place:
    step, moves, phase, since = _PLACE.unpack_from(memory, 0)
    return Place(step, moves, PHASES[phase], since)
