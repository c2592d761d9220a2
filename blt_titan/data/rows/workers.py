"""Worker processes of a loader: each makes its share of the blocks, and hands them over on a pipe of its own.

In: what makes the blocks of worker w. Out: blocks, asked for worker by worker. A worker that ends, or shows no sign of
life for a while, is an error that names it and what it was reading; the caller may begin all of them anew.

The decision that is not obvious: these are not the workers of torch's DataLoader. Those share one queue, so that one
which is killed or stopped while it writes leaves its lock, or half a message that the trainer waits for without end;
and the death of one is raised in the trainer wherever it is, in the middle of a step. Here half a message concerns one
pipe, read only as far as there is something to read, and a death is noticed when the worker's rows are asked for.
"""

import contextlib
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any

import torch

from blt_titan.data.prepare.worker_pool import die_with_parent
from blt_titan.data.store.fetch_counts import count_as_worker
from blt_titan.data.store.waits import say_to

MakeBlocks = Callable[[int, Callable[[str], None]], Iterator[Any]]
"""Makes the blocks of worker w, given w and a function that notes in a few words what it begins to read."""

BUSY_WAITS = 5
"""A worker that computes or reads, but makes nothing, is waited for so many times as long as one that does nothing."""
_LOOK_S = 1.0
_NOTE_BYTES = 8192
_LENGTH = struct.Struct("<Q")
_MAJOR_FAULTS, _USER_TIME, _SYSTEM_TIME = 9, 11, 12  # of /proc/<pid>/stat, counted from its third field
_STATES = {
    "T": "its process is stopped",
    "t": "its process is stopped by a debugger",
    "D": "its process waits for a disk or a mount",
}


class WorkerLostError(RuntimeError):
    """A worker ended, or shows no sign of life; names it and what it was reading."""


class Note:
    """A few words that a worker writes and its trainer reads, also when the worker answers no more."""

    def __init__(self):
        self._memory = mmap.mmap(-1, _NOTE_BYTES)  # shared with what is forked

    def write(self, words: str) -> None:
        """Replace the words."""
        said = words.encode()[: _NOTE_BYTES - 2]
        self._memory[: 2 + len(said)] = struct.pack("<H", len(said)) + said

    def read(self) -> str:
        """Return the words, empty if none were written."""
        (length,) = struct.unpack("<H", self._memory[:2])
        return self._memory[2 : 2 + length].decode(errors="replace")


class Worker:
    """One worker process.

    Args:
        number: w.
        make: see `MakeBlocks`.
        ahead: blocks that it makes before they are asked for.
        wait_s: seconds without a sign of life after which it is lost.
    """

    def __init__(self, number: int, make: MakeBlocks, *, ahead: int, wait_s: float):
        self.number, self._wait_s = number, wait_s
        self._note, self._waits = Note(), Note()
        self._reader, writer = os.pipe()
        # Workers know the rules that the user registered, as they are copies of this process.
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=_work, args=(number, make, ahead, self._note, self._waits, self._reader, writer), daemon=True
        )
        self._process.start()
        os.close(writer)  # so that the end of the worker is the end of the pipe
        os.set_blocking(self._reader, False)
        # They ignore what multiprocessing would end them with.
        self._end = util.Finalize(self, _end, (self._process, self._reader), exitpriority=1)

    def next_block(self) -> Any:
        """Wait for the next block.

        Raises:
            WorkerLostError: it ended, or shows no sign of life.
            Exception: what was raised in it, with its traceback as a note.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        block, error = pickle.loads(self._read(length))  # of our own process
        if error is not None:
            raise error
        return block

    def close(self) -> None:
        """End the process."""
        self._end()

    def _read(self, length: int) -> bytearray:
        content = bytearray(length)
        left = memoryview(content)
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        silent_s = waited_s = 0.0
        signs = None
        while left:
            began = time.monotonic()
            if not poll.poll(_LOOK_S * 1000):
                # Not by the clock: all processes of a job may be stopped for a while, and go on.
                passed_s = min(time.monotonic() - began, 2 * _LOOK_S)
                silent_s += passed_s
                # A wait for a store that shows signs of life ends by itself, after `data.fetch_timeout_s`.
                waited_s += 0.0 if self._waits.read() else passed_s
                if signs != (signs := self._signs_of_life()):
                    silent_s = 0.0
                if silent_s >= self._wait_s or waited_s >= BUSY_WAITS * self._wait_s:
                    raise WorkerLostError(self._silence(silent_s, waited_s))
                continue
            got = os.readv(self._reader, [left])
            if not got:
                raise WorkerLostError(f"{self._name()} ended ({self._ending()}){self._reading()}")
            left = left[got:]
        return content

    def _signs_of_life(self) -> tuple[Any, ...]:
        """Return what changes while a worker computes, or while a disk gives it anything."""
        try:
            process = Path(f"/proc/{self._process.pid}")
            times = (process / "stat").read_text().rpartition(")")[2].split()
            read = (process / "io").read_text().split()
        except OSError:  # it has ended, or there is no such place
            return (self._note.read(), self._waits.read())
        cpu = (times[_MAJOR_FAULTS], times[_USER_TIME], times[_SYSTEM_TIME])
        return (self._note.read(), self._waits.read(), *cpu, read[1], read[9])

    def _name(self) -> str:
        return f"loader worker {self.number} (process {self._process.pid})"

    def _reading(self) -> str:
        return "".join(f"; {words}" for note in (self._note, self._waits) if (words := note.read()))

    def _silence(self, silent_s: float, waited_s: float) -> str:
        if silent_s < self._wait_s:
            return f"{self._name()} is busy, but has made no batch for {waited_s:.0f} s{self._reading()}"
        state = ""
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            state = f" ({_STATES[stat[0]]})" if stat[0] in _STATES else ""
        return f"{self._name()} has shown no sign of life for {silent_s:.0f} s{state}{self._reading()}"

    def _ending(self) -> str:
        self._process.join(_LOOK_S)
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        killed = f"by {signal.Signals(-code).name}"
        return f"{killed}, perhaps because memory ran out" if -code == signal.SIGKILL else killed


def _end(process: Any, reader: int) -> None:
    process.kill()
    process.join(5)  # one that waits for a dead mount cannot even be killed
    os.close(reader)


def _work(number: int, make: MakeBlocks, ahead: int, note: Note, waits: Note, reader: int, writer: int) -> None:
    """Make blocks and write each as its length and its pickle, in a process of its own."""
    die_with_parent()
    count_as_worker(number)
    say_to(waits.write)
    # What tells the run to leave (`training/preemption.py`) may reach workers as well, as from a scheduler; the trainer
    # still needs their rows then.
    for number_of_signal in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number_of_signal, signal.SIG_IGN)
    os.close(reader)
    torch.set_num_threads(1)
    room = threading.Semaphore(ahead)
    messages: list[bytes] = []
    more = threading.Semaphore(0)

    def send() -> None:
        while True:
            more.acquire()
            message = messages.pop(0)
            for part in (_LENGTH.pack(len(message)), message):
                left = memoryview(part)
                while left:
                    try:
                        left = left[os.write(writer, left) :]
                    except BrokenPipeError:  # the trainer has ended, and this process ends with it
                        os._exit(0)
            room.release()

    threading.Thread(target=send, daemon=True).start()
    made = _messages(make, number, note)
    while True:
        room.acquire()
        message = next(made, None)
        if message is None:
            break
        messages.append(message)
        more.release()
    threading.Event().wait()  # the trainer ends it


def _messages(make: MakeBlocks, number: int, note: Note) -> Iterator[bytes]:
    try:
        for block in make(number, note.write):
            yield pickle.dumps((block, None), protocol=5)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            message = pickle.dumps((None, error))
            pickle.loads(message)
        except Exception:  # not every exception pickles
            message = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        yield message
