"""A process for each peer, and steps in turn: one computes while the others wait.

The parent starts a `Worker` for each `PeerSpec`, and asks for one measurement at a time. So a peer has memory, threads
and compiled code of its own, and a machine that other work makes slower is slower for all peers. On a CPU what counts
is processor time, which other work on the machine hardly changes; on a GPU it is the clock, with the device waited for.

Memory is the peak of one more step over a base: what the process has after a step, its gradients let go of and the
allocator's free memory given back. So weights and code are none of it; activations, gradients and scratch are.
"""

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from blt_titan.bench.peers import Peer, PeerSpec, build

_PEAK_IS_HERE = "5"
"""Written to /proc/self/clear_refs, it sets the peak to what is resident now."""


class PeerFailedError(RuntimeError):
    """A peer could not be built or measured; says why in a sentence."""


@dataclass(frozen=True)
class Step:
    """A forward and a backward, measured."""

    cpu_s: float
    """Processor time of all threads of the process."""
    wall_s: float
    loss: float
    """NaN where there is none."""


class Worker:
    """A peer in a process of its own; to be used as a context manager.

    Args:
        spec: what the process builds; `warm_up` waits until it has.
    """

    def __init__(self, spec: PeerSpec):
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec))
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        if error[0] is not None:
            self._process.terminate()
        self._process.join()

    def step(self) -> Step:
        """Make one step and measure it; the first ones compile, and are for warming up.

        Raises:
            PeerFailedError: the process said why it cannot, or has died.
        """
        return Step(**self._ask("step"))

    def peak_bytes(self) -> int:
        """Return the peak of memory of one more step over the base; errors as `step`."""
        return self._ask("peak")["peak_bytes"]

    def _ask(self, what: str) -> dict[str, Any]:
        try:
            self._connection.send(what)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            hint = "; the machine may have too little memory" if code == -signal.SIGKILL else ""
            raise PeerFailedError(f"its process {why}{hint}") from None
        if "failed" in answer:
            raise PeerFailedError(answer["failed"])
        return answer


def _serve(connection: Connection, spec: PeerSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the connection
    torch.set_num_threads(spec.threads)
    if spec.device == "cpu":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside this one
    peer: Peer | None = None
    while True:
        try:
            asked = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            peer = peer or build(spec)
            answer = _step(peer, spec.device) if asked == "step" else {"peak_bytes": _peak_bytes(peer, spec.device)}
            if spec.gives_back:
                _give_back()
        except (RuntimeError, MemoryError, ValueError, ImportError) as error:
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def _step(peer: Peer, device: str) -> dict[str, float]:
    _wait(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    loss = peer.step()
    _wait(device)
    measured = {"cpu_s": time.process_time() - began_cpu, "wall_s": time.perf_counter() - began}
    peer.release()
    return measured | {"loss": float(loss)}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _peak_bytes(peer: Peer, device: str) -> int:
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        peer.step()
        torch.cuda.synchronize(device)
        peer.release()
        return torch.cuda.max_memory_allocated(device) - base
    _give_back()
    base = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text(_PEAK_IS_HERE)
    peer.step()
    peak = _resident("VmHWM") - base
    peer.release()
    return peak


def _give_back() -> None:
    """Return what the C library's allocator keeps free to the system, where it can be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def same_loss(steps: dict[str, float]) -> str:
    """Say in a sentence whether losses of the same rows and weights agree; empty if they do.

    >>> same_loss({"eager": 5.56, "transformers": 5.5600001}), same_loss({"eager": 5.5, "transformers": 5.6})
    ('', 'losses of the same rows and weights differ: eager 5.50000, transformers 5.60000')
    """
    least, most = min(steps.values()), max(steps.values())
    if math.isfinite(most) and most - least <= _LOSS_RTOL * abs(most):
        return ""
    return "losses of the same rows and weights differ: " + ", ".join(f"{k} {v:.5f}" for k, v in steps.items())


_LOSS_RTOL = 5e-3
"""Far above what bf16 rounds away in a mean over a row, far below what another model or other rows give."""
