"""Worker processes: tasks spread over them with one progress bar, and none that outlives its parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from blt_titan.data.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2)."""
_POLL_S = 0.2
_REPORT_BYTES = 1 << 20

_shared: Any = None
"""In a worker: the bytes that all workers have done, and whether to stop."""


class _Stopped(Exception):
    """Another worker failed, so this one need not go on."""


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
    bar = tqdm(total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, desc=description, disable=not progress)

    def report(n_bytes: int) -> None:
        bar.update(n_bytes)

    with bar:
        if workers == 1 or len(tasks) <= 1:
            return [(task, function(task, report)) for task in tasks]
        context = multiprocessing.get_context("spawn")
        shared = (context.Value("q", 0), context.Event())
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _begin_worker, shared) as pool:
            futures = [pool.submit(_call, function, task) for task in tasks]
            left, told = set(futures), 0
            while left:
                finished, left = wait(left, _POLL_S, FIRST_EXCEPTION)
                bar.update(shared[0].value - told)
                told = shared[0].value
                if failed := next((error for done in finished if (error := done.exception())), None):
                    shared[1].set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    if isinstance(failed, BrokenProcessPool):
                        raise DataError(
                            "a worker process was killed, perhaps because memory ran out: start again to go on, with "
                            "fewer --workers or less --memory"
                        ) from failed
                    raise failed
            return [(task, future.result()) for task, future in zip(tasks, futures, strict=True)]


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
        if held >= _REPORT_BYTES:
            if stop.is_set():
                raise _Stopped
            with done_bytes.get_lock():
                done_bytes.value += held
            held = 0

    result = function(task, report)
    with done_bytes.get_lock():
        done_bytes.value += held
    return result
