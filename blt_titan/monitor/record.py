"""What a run says of itself in its folder, for `blt-titan status` and for whoever finds it dead.

<dump_folder>/status.json   who runs since when, the last line, the last held-out figure, the last warning; by rank 0
<dump_folder>/ended.json    how the run ended and the sentence that says why; a run that was killed has none

The decision that is not obvious: the end is a file of its own, which the first rank that ends makes and no other
replaces. Where one rank fails, others fail after it, of lost connections; the first one's sentence is the cause.
"""

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from blt_titan.data.store.atomic_file import write_atomically

logger = logging.getLogger(__name__)

STATUS_NAME, ENDED_NAME, LOCK_NAME = "status.json", "ended.json", "run.lock"
VERSION = 1
LEAST_S_BETWEEN_WRITES = 2.0

Reason = Literal["done", "preempted", "refused", "failed"]
REASONS: tuple[Reason, ...] = ("done", "preempted", "refused", "failed")


@dataclass(frozen=True)
class End:
    """How a run ended."""

    reason: Reason
    exit_code: int
    sentence: str
    rank: int
    step: int
    time: float
    """Seconds since 1970, as all times here."""


class RunRecord:
    """Writes what a run says of itself; does nothing before `begin`. A disk that is full is no reason to stop a run."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._rank = 0
        self._status: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._written_at = -LEAST_S_BETWEEN_WRITES
        self._failed = False
        self._step = 0
        self.has_trained = False
        """Whether this start has made a step."""
        self.on_end: Callable[[End], None] | None = None
        """Told how the run ended, when this rank does."""

    def begin(
        self,
        dump_folder: str | os.PathLike[str],
        *,
        rank: int,
        world_size: int,
        steps: int,
        log_freq: int,
        checkpoints: Path,
    ) -> None:
        """Begin a record; of a rank but 0 only when rank 0 is known to hold the folder.

        Args:
            dump_folder: the run's.
            rank: this one.
            world_size: ranks of the run.
            steps: that the run will have made in the end.
            log_freq: steps from line to line.
            checkpoints: the folder of its checkpoints.
        """
        self._folder, self._rank = Path(dump_folder), rank
        if rank != 0:
            return
        self._before = _read_before(self._folder / STATUS_NAME)
        with contextlib.suppress(OSError):
            (self._folder / ENDED_NAME).unlink(missing_ok=True)
        self._status = {
            "version": VERSION,
            "start": {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": time.time(),
                "world_size": world_size,
                "step": 0,
                "steps": steps,
                "log_freq": log_freq,
                "checkpoints": os.path.relpath(checkpoints, self._folder),
            },
            "first": None,
            "last": None,
            "held_out": None,
            "warning": None,
        }
        self._write()

    def loaded(self, step: int) -> None:
        """Go on from a checkpoint: what an earlier start said up to its step holds."""
        self._step = step
        if not self._status:
            return
        self._status["start"]["step"] = step
        for name in ("held_out", "warning"):
            if (said := self._before.get(name)) and said["step"] <= step:
                self._status[name] = said
        self._write()

    def made(self, step: int) -> None:
        """Note a step that was made; writes nothing."""
        self._step, self.has_trained = step, True

    def line(self, step: int, *, bytes_per_second: float, bits_per_byte: float | None) -> None:
        """Note a logged line."""
        if not self._status:
            return
        now = time.time()
        bits = bits_per_byte if bits_per_byte is not None and math.isfinite(bits_per_byte) else None
        last = {"step": step, "time": now, "bytes_per_second": bytes_per_second, "bits_per_byte": bits}
        self._status["last"] = last
        # What came before it was start-up and compiling, from which no rate follows.
        self._status["first"] = self._status["first"] or {"step": step, "time": now}
        self._write_soon(at_once=step == self._status["start"]["steps"])

    def held_out(self, step: int, bits_per_byte: float) -> None:
        """Note a held-out figure."""
        if self._status and math.isfinite(bits_per_byte):
            self._status["held_out"] = {"step": step, "time": time.time(), "bits_per_byte": bits_per_byte}
            self._write_soon(at_once=True)

    def warning(self, step: int, sentence: str) -> None:
        """Note a warning."""
        if self._status:
            self._status["warning"] = {"step": step, "time": time.time(), "sentence": sentence}
            self._write_soon(at_once=True)

    def end(self, reason: Reason, exit_code: int, sentence: str) -> None:
        """Note how the run ended, unless another rank has; does nothing on a rank that has not begun."""
        if self._folder is None:
            return
        if self._status:
            self._write()
        end = End(reason, exit_code, " ".join(sentence.split()), self._rank, self._step, time.time())
        path = self._folder / ENDED_NAME
        with self._said_once():
            try:
                # Small enough to be written at once; a reader takes half of it for none.
                with open(path, "x") as file:
                    file.write(json.dumps(asdict(end)) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except FileExistsError:
                end = read_end(path) or end
        if self.on_end is not None:
            self.on_end(end)
        self._folder, self._status = None, {}

    def _write_soon(self, *, at_once: bool) -> None:
        if at_once or time.monotonic() - self._written_at >= LEAST_S_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        self._written_at = time.monotonic()
        path = self._folder / STATUS_NAME
        with self._said_once():
            write_atomically(
                path, (json.dumps(self._status, indent=1) + "\n").encode(), temporary=path.with_name(f".{path.name}")
            )

    @contextlib.contextmanager
    def _said_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                logger.warning(f"{self._folder}: the run's status cannot be written ({error.strerror}); it goes on")
            self._failed = True


def read_end(path: Path) -> End | None:
    """Return how a run ended; None if it did not say so."""
    try:
        content = json.loads(path.read_bytes())
        end = End(**{name: content[name] for name in End.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = {"exit_code": int, "sentence": str, "rank": int, "step": int, "time": float}
    is_sound = end.reason in REASONS and all(type(getattr(end, name)) is kind for name, kind in kinds.items())
    return end if is_sound else None


def _read_before(path: Path) -> dict[str, Any]:
    """Return what an earlier start wrote, as far as it is sound."""
    try:
        content = json.loads(path.read_bytes())
        return {name: content[name] for name in ("held_out", "warning") if type(content[name]["step"]) is int}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
