"""How a run stands, live or dead, from what lies in its folder; nothing is asked of the run itself.

In: the folder, and the time. Out: a `Status`, or lines to read.

    ended.json   run.lock   last write                the run is
    --           held       --                        running
    there        free       --                        done, preempted, refused or failed, as it says
    none         free       by this host              killed: the kernel gives the lock back when a process ends
    none         free       elsewhere, just now       running: not all file systems show another host's lock
    none         free       elsewhere, some time ago  killed

Times of another host are that host's; clocks are taken to agree to some seconds.
"""

import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from blt_titan.checkpoint.steps import METADATA, complete_steps
from blt_titan.monitor.record import ENDED_NAME, LOCK_NAME, STATUS_NAME, VERSION, End, read_end

SILENT_S = 60.0
"""The least time without a line after which a run is said to be silent, or on another host to be dead."""
SILENT_LINES = 10
"""Times the usual time between lines, likewise."""
_LATEST = 1e11
"""No time in seconds is as late."""

State = Literal["running", "done", "preempted", "refused", "failed", "killed"]


class StatusError(ValueError):
    """A folder that says nothing of a run; the message says why."""


@dataclass(frozen=True)
class Status:
    """How a run stands. Times are seconds since 1970."""

    folder: str
    state: State
    why: str
    """The sentence that ended it, or what is known instead; empty of a run that goes on as it should."""
    exit_code: int | None
    host: str
    pid: int
    world_size: int
    began: float
    heard: float
    """When the run last wrote."""
    line_logged: float | None
    """When the last line was logged, which a held-out figure may have followed."""
    step: int
    steps: int
    steps_per_second: float | None
    bytes_per_second: float | None
    bits_per_byte: float | None
    seconds_left: float | None
    """By the rate since the start, saves and validation included; of a run that goes on."""
    checkpoint_step: int | None
    checkpoint_saved: float | None
    held_out: dict[str, Any] | None
    warning: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return it as `blt-titan status --json` prints it."""
        return asdict(self)


def read_status(dump_folder: str | os.PathLike[str], *, now: float | None = None) -> Status:
    """Read how the run of a folder stands.

    Args:
        dump_folder: of the run.
        now: seconds since 1970; None for this moment.

    Raises:
        StatusError: there is no run, or its record is damaged.
    """
    folder = Path(dump_folder)
    path = folder / STATUS_NAME
    now = time.time() if now is None else now
    try:
        return _status(folder, json.loads(path.read_bytes()), now)
    except FileNotFoundError:
        found = "no run was started there, or one of an earlier version" if folder.is_dir() else "no such folder"
        raise StatusError(f"{folder}: has no {STATUS_NAME}; {found}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StatusError(f"{path}: is damaged ({type(error).__name__}: {str(error)[:100]})") from None


def _status(folder: Path, record: dict[str, Any], now: float) -> Status:
    if record["version"] != VERSION:
        raise ValueError(f"version {record['version']!r}, this code reads {VERSION}")
    start, first, last, warning = (record[key] for key in ("start", "first", "last", "warning"))
    end = read_end(folder / ENDED_NAME)
    heard = max(_time(part["time"]) for part in (start, last, record["held_out"]) if part is not None)
    step = max(int(start["step"]), int(last["step"]) if last else 0, end.step if end else 0)
    rate = _rate(first, last)
    of_a_line_s = int(start["log_freq"]) / rate if rate else 0.0
    is_silent = now - heard > max(SILENT_S, SILENT_LINES * of_a_line_s)
    state, why = _state(folder, str(start["host"]), end, silent_s=now - heard, is_silent=is_silent)
    left = max(0, int(start["steps"]) - step) / rate if state == "running" and rate else None
    saved = _newest(folder / start["checkpoints"])
    return Status(
        folder=str(folder),
        state=state,
        why=why,
        exit_code=end.exit_code if end and state != "running" else None,
        host=str(start["host"]),
        pid=int(start["pid"]),
        world_size=int(start["world_size"]),
        began=_time(start["time"]),
        heard=max(heard, _time(end.time)) if end and state != "running" else heard,
        line_logged=_time(last["time"]) if last else None,
        step=step,
        steps=int(start["steps"]),
        steps_per_second=rate,
        bytes_per_second=float(last["bytes_per_second"]) if last else None,
        bits_per_byte=float(last["bits_per_byte"]) if last and last["bits_per_byte"] is not None else None,
        seconds_left=left if left is None or left < _LATEST else None,
        checkpoint_step=saved[0] if saved else None,
        checkpoint_saved=saved[1] if saved else None,
        held_out=_of(record["held_out"], step=int, time=_time, bits_per_byte=float),
        warning=_of(warning, step=int, time=_time, sentence=str),
    )


def _time(value: Any) -> float:
    if not 0 <= float(value) < _LATEST:
        raise ValueError(f"a time is {value!r}")
    return float(value)


def _of(part: Any, **kinds: Callable[[Any], Any]) -> dict[str, Any] | None:
    return None if part is None else {name: kind(part[name]) for name, kind in kinds.items()}


def _state(folder: Path, host: str, end: End | None, *, silent_s: float, is_silent: bool) -> tuple[State, str]:
    """Return the state and a sentence; see the table of this module."""
    held, is_here = is_locked(folder / LOCK_NAME), host == socket.gethostname()
    if held or (held is None and end is None and not is_silent):
        why = f"nothing was written for {span(silent_s)}: it starts, saves, validates, or hangs" if is_silent else ""
        return "running", why
    if end is not None:
        return end.reason, end.sentence
    if not is_here and not is_silent:
        return "running", f"its lock is not seen from here, but {host} wrote {span(silent_s)} ago"
    return "killed", f"it left no word of its end; {host} last wrote {span(silent_s)} ago"


def _rate(first: dict[str, Any] | None, last: dict[str, Any] | None) -> float | None:
    if not first or not last:
        return None
    steps, seconds = int(last["step"]) - int(first["step"]), _time(last["time"]) - _time(first["time"])
    return steps / seconds if steps > 0 and seconds > 0 else None


def _newest(checkpoints: Path) -> tuple[int, float] | None:
    for step, path in reversed(complete_steps(checkpoints).items()):
        try:
            return step, (path / METADATA).stat().st_mtime
        except OSError:  # removed meanwhile
            continue
    return None


def is_locked(path: Path) -> bool | None:
    """Tell whether a process holds the lock of a run; None where the file system does not say.

    It is asked for and not tried: a lock that is taken for a moment would have a run refused that starts just then.
    A process must not ask for its own, which it would lose.
    """
    # struct flock of Linux: type, whence, start, length, process; 64 bits.
    layout = "hhqqi4x"
    try:
        with path.open("rb") as file:
            asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    except FileNotFoundError:
        return False
    except OSError:
        return None


def status_lines(status: Status, *, now: float | None = None) -> Iterator[str]:
    """Yield what `blt-titan status` prints."""
    now = time.time() if now is None else now
    code = "" if status.exit_code is None else f", exit code {status.exit_code}"
    since = f"since {_clock(status.began)}" if status.state == "running" else f"{span(now - status.heard)} ago"
    ranks = f"{status.world_size} rank{'s' if status.world_size > 1 else ''}"
    yield f"{status.folder}: {status.state}{code}, {since}, {ranks}, process {status.pid} on {status.host}"
    if status.why:
        yield f"  {status.why}"
    rate = ""
    if status.steps_per_second and status.bytes_per_second is not None:
        rate = f", {_per_second(status.steps_per_second)}, {status.bytes_per_second:,.0f} bytes/s"
    yield f"  step {status.step:,} of {status.steps:,}{rate}"
    if status.seconds_left is not None:
        yield f"  {span(status.seconds_left)} left: until {_clock(now + status.seconds_left)}"
    if status.bits_per_byte is not None and status.line_logged is not None:
        ago = f", {span(now - status.line_logged)} ago" if status.state == "running" else ""
        yield f"  last line: {status.bits_per_byte:.4f} bits/byte{ago}"
    if status.checkpoint_step is None or status.checkpoint_saved is None:
        yield "  no checkpoint"
    else:
        yield f"  last checkpoint: step {status.checkpoint_step:,}, {span(now - status.checkpoint_saved)} ago"
    if (held_out := status.held_out) is not None:
        yield f"  last held-out: {held_out['bits_per_byte']:.4f} bits/byte, step {held_out['step']:,}"
    if (warning := status.warning) is not None:
        yield f"  last warning, {span(now - warning['time'])} ago: step {warning['step']:,}: {warning['sentence']}"


def span(seconds: float) -> str:
    """Write a time as people say it.

    >>> span(3.7), span(95), span(7384), span(200_000)
    ('4 s', '1 min 35 s', '2 h 3 min', '2 d 7 h')
    """
    whole = max(0, round(seconds))
    for unit, size, below, small in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {below}"
    return f"{whole} s"


def _per_second(rate: float) -> str:
    return f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.2f} s a step"


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
