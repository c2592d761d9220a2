"""Start the ranks of a training run on this node with torchrun's own launcher, and end as they end.

In: how many ranks and nodes, and the arguments of `blt_titan.train`. Out: an exit code.

The decisions that are not obvious: torchrun is called as a function and not as a program, with the options that its
command line has. Its program answers Ctrl-C, and every rank that fails, with tracebacks, and gives 1 for any of them.
And what tells a run to leave (`training/preemption.py`) is not torchrun's: it would end ranks 30 seconds later, saved
or not. Signals are passed on, and torchrun waits for the ranks as ever.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from blt_titan.training.preemption import EXIT_CODE, SIGNALS

RANK_MODULE = "blt_titan.train"
DEFAULT_PORT = 29500
_REFUSED = 2
"""How a rank ends when settings or data are at fault; its message is a sentence."""
FAILED_WORK = ("NonFiniteLossError", "RowsDifferError", "ExportFailedError")
"""Errors of `blt_titan.train.FAILED_WORK` by name: exit code 1, as of a fault of the program, but with a sentence."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads the settings of its GPU allocator from; the second is the name of old."""
_TALKATIVE = ("agent.server.api", "multiprocessing.api")
"""Modules of torchrun's that log each process that they end, and each that failed, which is said in the end."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job, as torchrun counts them."""

    nproc: int
    """Ranks on this node."""
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    log_rank: str = "0"
    """Ranks of this node that print, separated by commas."""

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nproc * self.nnodes

    def torchrun_options(self) -> list[str]:
        """Return the options of torchrun's command line."""
        if self.nnodes == 1 and self.master_port is None:
            meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        else:
            meeting = [
                f"--node-rank={self.node_rank}",
                f"--master-addr={self.master_addr or 'localhost'}",
                f"--master-port={self.master_port or DEFAULT_PORT}",
            ]
        return [
            *(f"--nnodes={self.nnodes}", f"--nproc-per-node={self.nproc}", *meeting),
            *(f"--local-ranks-filter={self.log_rank}", "--role=rank", "--tee=3"),
            # The others are passed on to the ranks, which save what they made.
            "--signals-to-handle=SIGHUP,SIGQUIT",
        ]


def launch(name: str, ranks: Ranks, arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code of the first that failed.

    Args:
        name: of the command, which messages begin with.
        ranks: how many, and where.
        arguments: of each rank, as `blt_titan.train` takes them.

    Returns:
        0, `preemption.EXIT_CODE` if the run was told to leave, or the code of the first rank that failed.
    """
    # A run's folder says with how many ranks it was started.
    os.environ.update(NGPU=str(ranks.nproc), NNODES=str(ranks.nnodes))
    # Threads that wait should sleep: spinning on cores that another process wants made steps 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not any(name in os.environ for name in _ALLOCATOR):
        # What one phase of a step frees can then serve another that asks for other sizes.
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    for module in _TALKATIVE:
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    told = _Told()
    try:
        with told.passed_on():
            torchrun.run(torchrun.parse_args([*ranks.torchrun_options(), "-m", RANK_MODULE, *arguments]))
    except _ToldTooEarlyError as early:
        print(f"{name}: told to leave by {early}; no rank had begun", file=sys.stderr)
        return EXIT_CODE
    except SignalException as end:
        number = int(end.sigval)
        print(f"{name}: ended by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        kind, sentence = _cause(failure)
        if failure.exitcode == EXIT_CODE:
            print(f"{name}: {sentence}", file=sys.stderr)
            return EXIT_CODE
        if told.signal is not None and failure.exitcode == -told.signal:
            said = signal.Signals(told.signal).name
            print(f"{name}: told to leave by {said} before training had begun; nothing was lost", file=sys.stderr)
            return EXIT_CODE
        if failure.exitcode != _REFUSED and kind not in FAILED_WORK:
            sentence = str(error).strip()
        elif not sentence.startswith(f"rank {rank}: "):
            sentence = f"rank {rank}: {sentence}"
        print(f"{name}: error: {sentence}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


class _ToldTooEarlyError(Exception):
    """The run was told to leave before there was a rank to tell; names the signal."""


class _Told:
    """Passes signals on to the ranks of this node."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first that came."""

    @contextlib.contextmanager
    def passed_on(self) -> Iterator[None]:
        """Take the signals over; SIGINT stays ignored where it is, as in the background of a shell."""
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._pass_on) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number
        ranks = _ranks_of_this_process()
        if not ranks:
            raise _ToldTooEarlyError(signal.Signals(number).name)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _ranks_of_this_process() -> list[int]:
    """Return the processes of the ranks that torchrun has started here."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            words = (status.parent / "cmdline").read_bytes().split(b"\0") if parent == os.getpid() else []
        except OSError:  # it has ended
            continue
        if RANK_MODULE.encode() in words:
            found.append(int(status.parent.name))
    return found


def _cause(failure: ProcessFailure) -> tuple[str, str]:
    """Return the class and the sentence of the error that ended a rank; no class where it recorded none."""
    said: Any = failure.message
    text = str(said["message"] if isinstance(said, dict) else said).strip().splitlines()[-1]
    kind, _, sentence = text.partition(": ")
    return (kind, sentence) if kind.endswith("Error") and sentence else ("", text)
