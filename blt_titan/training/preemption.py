"""A run that is told to leave: every rank stops after the same step, once what it did is saved.

A scheduler sends SIGTERM or SIGUSR1 before it takes the machine, a user Ctrl-C (SIGINT); to the launcher, which passes
it on, or to a rank. One rank that was told is enough:

    rank 0   step 7: nobody     step 8: somebody was told     leaves after 8 + LOOKED_BACK
    rank 1   step 7: SIGUSR1    step 8: somebody was told     leaves after 8 + LOOKED_BACK

The decision that is not obvious: whether anybody was told is summed over ranks in each step, with the number of
targets, and looked at a few steps later. The sum is the same everywhere, so all leave after the same step; and the
host, which on a GPU runs ahead of the device, waits only for what the device did steps ago. Asked on the host instead,
one rank would wait at the end of a step for another that is in the next one, and waits there for the first.

A second signal to a rank ends it at once, if it comes more than a second later: schedulers signal every process of a
job, and then the launcher passes on what it was sent.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import torch

from blt_titan.training.late_reads import LateReads

EXIT_CODE = 75
"""How a rank, and `blt-titan train`, end when they were told to: EX_TEMPFAIL of sysexits.h, "try again later"."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SIGNAL_S = 1.0
"""Signals so close to the first are the same one, on another way."""


class PreemptedError(RuntimeError):
    """The run was told to leave, and did so after a step."""


class Preemption:
    """Whether this run was told to leave, and after which step all ranks do."""

    def __init__(self):
        self._signal: int | None = None
        self._heard_at = 0.0
        self._sums: LateReads[None] = LateReads()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Take the signals over; `SIGINT` stays ignored where it is, as in the background of a shell."""
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def told(self) -> int:
        """Return 1 if this rank was told to leave, else 0: what is summed over ranks."""
        return int(self._signal is not None)

    @property
    def name(self) -> str:
        """Return what the run was told by, as far as this rank knows."""
        return "another rank's signal" if self._signal is None else signal.Signals(self._signal).name

    def note(self, told: torch.Tensor) -> None:
        """Keep how many ranks were told when a step was made, a scalar on the device; nothing waits for it here."""
        self._sums.put(None, told)

    def is_due(self, device_type: str) -> bool:
        """Tell after a step whether it is the last; the same on all ranks, which have noted the same steps."""
        leaves = [bool(told > 0) for _, told in self._sums.take(device_type)]
        return any(leaves)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._heard_at = number, now
        elif now - self._heard_at > SAME_SIGNAL_S:
            os._exit(128 + number)
