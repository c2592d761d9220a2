"""A run's metrics file, read as it grows: thinned curves, the best held-out figure, and what could not be read.

A file may be long, damaged or being written. Memory is bounded whatever lies in it: a curve that has become too long
loses every other point and from then on takes only every second, fourth, ... one; a line that is too long is passed
over in pieces. What is asked for again is read again only from where the last reading ended.
"""

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_POINTS = 2000
"""Points that a curve keeps; a longer one is thinned."""
MOST_LINE_BYTES = 1 << 20
FIGURES = ("bits_per_byte", "heldout_bits_per_byte", "training_flops", "mean_patch_bytes")
"""What is read of a line, beside its step."""
BEYOND = 1e300
"""No figure is as large; the page can still multiply it."""
_BEYOND_STEPS = 2**53
"""A browser's numbers count so far."""
_COMPARED_BYTES = 256


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, and nothing that could wait or never end.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "not a regular file", str(path))
    return file


def parse_line(line: bytes) -> dict[str, Any]:
    """Return what a line of metrics holds.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        text = line.strip(b" \t\r\n").decode()
        content, end = _DECODER.raw_decode(text)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    if end != len(text) or not isinstance(content, dict):
        raise ValueError("not one JSON object")
    if type(step := content.get("step")) is not int or not 0 <= step < _BEYOND_STEPS:
        raise ValueError(f'"step" is {reprlib.repr(step)}, not a whole number below 2^53')
    for key in FIGURES:
        if (value := content.get(key)) is not None:
            check_number(key, value)
    return content


def check_number(key: str, value: Any, *, least: float = 0) -> None:
    """Raise ValueError unless a value is a number of at least `least` that can be drawn."""
    # Not by isinstance: a boolean is an int in Python.
    if type(value) not in (int, float) or not least <= value <= BEYOND:
        raise ValueError(
            f'"{key}" is {reprlib.repr(value)}, not a number from {least:g} to {BEYOND:g}'.replace("e+", "e")
        )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


class Curve:
    """At most MOST_POINTS of the points added, evenly spaced, with the first and the last."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, float]] = []
        self._last: tuple[int, float] | None = None
        self._stride, self._added = 1, 0

    def add(self, step: int, value: float) -> None:
        """Add a point."""
        self._last = (step, value)
        if self._added % self._stride == 0:
            if len(self._kept) == MOST_POINTS - 1:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            if self._added % self._stride == 0:
                self._kept.append(self._last)
        self._added += 1

    def points(self) -> list[tuple[int, float]]:
        """Return (step, value) of those that were kept."""
        more = [self._last] if self._last is not None and self._last is not self._kept[-1] else []
        return self._kept + more


class RunMetrics:
    """What a metrics file says, as far as it has been read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.training, self.heldout = Curve(), Curve()
        self.best: dict[str, Any] | None = None
        """Best held-out bits per byte, with the training FLOPs until there and its step."""
        self.longest_mean_patch_bytes: float | None = None
        self._flops = 0.0
        self._status: tuple[int, ...] = ()
        self._offset, self._before = 0, b""
        self._lines, self._bad, self._unfinished = 0, 0, ""
        self._first_bad = ""

    def update(self) -> None:
        """Read what is new in the file, or all of it if it is another one.

        Raises:
            OSError: it cannot be read.
        """
        with open_regular(self.path) as file:
            now = os.fstat(file.fileno())
            status = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
            if status == self._status:
                return
            if status[:2] != self._status[:2] or not self._continues(file):
                self._forget()
            self._read(file)
            self._status = status

    @property
    def skipped(self) -> int:
        """How many lines were passed over."""
        return self._bad + bool(self._unfinished)

    def note(self) -> str:
        """Return what was passed over and why; empty if nothing was."""
        if not self.skipped:
            return ""
        lines = self._lines + bool(self._unfinished)
        first = self._first_bad or f"line {lines}: {self._unfinished}"
        return f"{self.skipped:,} of {lines:,} lines passed over; the first, {first}"

    def _continues(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def _read(self, file: BinaryIO) -> None:
        file.seek(self._offset)
        self._unfinished = ""
        while line := file.readline(MOST_LINE_BYTES):
            fault, more = "", line
            while len(more) == MOST_LINE_BYTES and not more.endswith(b"\n"):
                fault, more = f"longer than {MOST_LINE_BYTES:,} bytes", file.readline(MOST_LINE_BYTES)
            try:
                if fault:
                    raise ValueError(fault)
                if not line.isspace():
                    self._take(parse_line(line))
            except ValueError as error:
                if not more.endswith(b"\n"):
                    self._unfinished = f"cut off, or still being written ({error})"
                    break
                self._bad += 1
                self._first_bad = self._first_bad or f"line {self._lines + 1:,}: {error}"
            self._lines += 1
            self._offset = self._offset + len(line) if more is line else file.tell()
        start = max(0, self._offset - _COMPARED_BYTES)
        file.seek(start)
        self._before = file.read(self._offset - start)

    def _take(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if (value := line.get("bits_per_byte")) is not None:
            self.training.add(step, float(value))
        self._flops = float(line.get("training_flops") or self._flops)
        if (patch := line.get("mean_patch_bytes")) is not None:
            self.longest_mean_patch_bytes = max(patch, self.longest_mean_patch_bytes or 0)
        if (value := line.get("heldout_bits_per_byte")) is not None:
            self.heldout.add(step, float(value))
            if self._flops and (self.best is None or value < self.best["bits_per_byte"]):
                self.best = {"flops": self._flops, "bits_per_byte": float(value), "step": step}
