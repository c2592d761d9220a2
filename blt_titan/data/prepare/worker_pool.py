"""Worker processes: tasks spread over them with one progress bar, and none that outlives its parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from blt_titan.data.store.errors import DataError
from blt_titan.progress import ProgressBar

Task = TypeVar("Task")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
"""The option of Linux's prctl(2) that names the signal for the parent's death."""
_POLL_S = 0.2
_REPORT_BYTES = 1 << 20

_shared: Any = None
"""In a worker: the bytes that all workers have done, and whether to stop."""


class _Stopped(Exception):
    """The work has ended with an error elsewhere, so this worker need not go on."""


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even of SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os.kill(os.getpid(), signal.SIGKILL)


def run_tasks(
    function: Callable[[Task, Callable[[int], None]], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    total_bytes: int | None,
    done_bytes: int,
    description: str,
    progress: bool,
) -> list[tuple[Task, Result]]:
    """Call `function(task, report)` for every task; return tasks and results in the order of the tasks.

    Args:
        function: of a module, so that it pickles; reports the bytes that it has done since it last did.
        tasks: what to call it with.
        workers: processes; with 1 nothing is started.
        total_bytes: of all tasks and of what was done before; None if unknown.
        done_bytes: what was done before.
        description: of the progress bar.
        progress: show it.

    Raises:
        Exception: the first that a task raised; tasks that are running are stopped, others not begun.
        DataError: a worker was killed.
    """
    bar = ProgressBar(
        total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, desc=description, disable=not progress
    )

    def report(n_bytes: int) -> None:
        bar.update(n_bytes)

    with bar:
        if workers == 1 or len(tasks) <= 1:
            return [(task, function(task, report)) for task in tasks]
        context = multiprocessing.get_context("spawn")
        shared = (context.Value("q", 0), context.Event())
        pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _begin_worker, shared)
        try:
            with _interrupts_ignored():
                futures = [pool.submit(_call, function, task) for task in tasks]
            left, told = set(futures), 0
            while left:
                finished, left = wait(left, _POLL_S, FIRST_EXCEPTION)
                report(shared[0].value - told)
                told = shared[0].value
                for future in finished:
                    future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps because memory ran out: start again to go on, with fewer "
                "--workers or less --memory"
            ) from error
        finally:
            # After all is done nothing waits here; after an error, or Ctrl-C, the workers stop at their next report.
            shared[1].set()
            pool.shutdown(wait=True, cancel_futures=True)
        return [(task, future.result()) for task, future in zip(tasks, futures, strict=True)]


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which reaches all of a terminal: the parent says what is to be done.

    They inherit it, and so ignore it from the first moment.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_worker(*shared: Any) -> None:
    global _shared
    _shared = shared
    die_with_parent()


def _call(function: Callable[[Any, Callable[[int], None]], Any], task: Any) -> Any:
    done_bytes, stop = _shared
    held = 0

    def report(n_bytes: int) -> None:
        nonlocal held
        held += n_bytes
        if stop.is_set():
            raise _Stopped
        if held >= _REPORT_BYTES:
            with done_bytes.get_lock():
                done_bytes.value += held
            held = 0

    result = function(task, report)
    with done_bytes.get_lock():
        done_bytes.value += held
    return result
