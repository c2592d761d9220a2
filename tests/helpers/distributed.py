"""Run a function on several gloo ranks and collect what each returns.

    losses = run_distributed(train_some, 2, "outputs", steps=5)    # [rank 0's value, rank 1's value]

Starting ranks costs seconds, so put many checks into one function. The function must be importable (module level), and
its arguments and value must pickle.
"""

import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 300


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: int = TIMEOUT_S, **kwargs: Any
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` fresh processes in one gloo group, `timeout_s` at most.

    Returns:
        The values, by rank.

    Raises:
        AssertionError: with the tracebacks of the ranks that failed.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, port, folder, fn, args, kwargs))
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout_s
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()) or 0.01)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not failures, "\n".join(failures)
        assert not hung, f"ranks {hung} did not end within {timeout_s} s"
        codes = [process.exitcode for process in ranks]
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [pickle.loads((Path(folder) / f"{rank}.value").read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: str, fn, args, kwargs) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    # Ranks that spin for each other on two cores are slower than one thread each, and one thread repeats exactly.
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
        value = fn(*args, **kwargs)
        dist.barrier()
        (Path(folder) / f"{rank}.value").write_bytes(pickle.dumps(value))
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
