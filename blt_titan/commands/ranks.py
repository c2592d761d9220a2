"""The ranks of one node, from their start to their end: torchrun's own launcher, and what its end means.

In: how many ranks and nodes, and the arguments of `blt_titan.train`. Out: an `Outcome`.

The decisions that are not obvious: torchrun is called as a function and not as a program, with the options that its
command line has. Its program answers Ctrl-C, and every rank that fails, with tracebacks, and gives 1 for any of them.
And what tells a run to leave (`training/preemption.py`) is not torchrun's: it would end ranks 30 seconds later, saved
or not. Signals are passed on, and torchrun waits for the ranks as ever.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError

from blt_titan.training.exit_codes import CAME_OUT_WRONG, LEFT, REFUSED
from blt_titan.training.preemption import SIGNALS

RANK_MODULE = "blt_titan.train"
DEFAULT_PORT = 29500
WRONG_WORK = ("NonFiniteLossError", "LossSpikeError", "RowsDifferError", "ExportFailedError")
"""Errors of `blt_titan.train.WRONG_WORK` by name."""
LOST_WORK = ("HungError", "PeerLostError", "StorageLostError", "WorkerLostError", "UnreachableError")
"""Errors of `blt_titan.train.LOST_WORK` by name: another try may go well; with a sentence."""
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

    def torchrun_options(self, port: int | None = None, log_folder: Path | None = None) -> list[str]:
        """Return the options of torchrun's command line.

        Args:
            port: of node 0, where the ranks of several nodes meet.
            log_folder: what the ranks print goes there too; None for a temporary one.
        """
        port = port or self.master_port
        if self.nnodes == 1 and port is None:
            meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        else:
            meeting = [
                f"--node-rank={self.node_rank}",
                f"--master-addr={self.master_addr or 'localhost'}",
                f"--master-port={port or DEFAULT_PORT}",
            ]
        return [
            *(f"--nnodes={self.nnodes}", f"--nproc-per-node={self.nproc}", *meeting),
            *(f"--local-ranks-filter={self.log_rank}", "--role=rank", "--tee=3"),
            *([] if log_folder is None else [f"--log-dir={log_folder}"]),
            # The others are passed on to the ranks, which save what they made.
            "--signals-to-handle=SIGHUP,SIGQUIT",
        ]


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a node, or of the whole job, ended."""

    code: int
    """0, `LEFT`, `REFUSED`, `CAME_OUT_WRONG`, or what else the first rank that failed ended with."""
    sentence: str = ""
    """What is said of it; empty where there is nothing to say."""
    was_told: bool = False
    """A launcher was told to leave, whatever came of it."""

    @property
    def is_worth_a_restart(self) -> bool:
        """Tell whether the same command may come further: a machine failed, or something that nobody foresaw."""
        return self.code not in (0, LEFT, REFUSED, CAME_OUT_WRONG) and not self.was_told


class ToldTooEarlyError(Exception):
    """The run was told to leave while there was no rank to tell; names the signal."""


class EndedBySignalError(Exception):
    """A signal that torchrun answers ended it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Told:
    """Passes signals on to the ranks of this node.

    Attributes:
        signal: the first that came.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._has_result = False

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

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note a signal and go on: ranks have ended, and what came of them is not to be lost."""
        self._has_result = True
        try:
            yield
        finally:
            self._has_result = False

    def _pass_on(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number
        if not self._has_result and not signal_ranks(number):
            raise ToldTooEarlyError(signal.Signals(number).name)


def run_ranks(
    ranks: Ranks, arguments: Sequence[str], told: Told, *, port: int | None = None, log_folder: Path | None = None
) -> Outcome:
    """Start the ranks of this node and wait for them.

    Args:
        ranks: how many, and where.
        arguments: of each rank, as `blt_titan.train` takes them.
        told: who passes signals on to them.
        port: as in `Ranks.torchrun_options`.
        log_folder: as there.

    Raises:
        EndedBySignalError: torchrun was ended.
    """
    for module in _TALKATIVE:
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    options = ranks.torchrun_options(port, log_folder)
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", RANK_MODULE, *arguments]))
    except SignalException as end:
        raise EndedBySignalError(int(end.sigval)) from end
    except (DistError, RendezvousError, OSError) as error:
        return Outcome(1, f"the ranks could not be started: {' '.join(str(error).split())[:300]}")
    except ChildFailedError as error:
        return _outcome(error, told)
    return Outcome(0)


def signal_ranks(number: int) -> bool:
    """Send a signal to each rank that torchrun has started here; tell whether there was one."""
    ranks = _ranks_of_this_process()
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(ranks)


def _outcome(error: ChildFailedError, told: Told) -> Outcome:
    rank, failure = error.get_first_failure()
    kind, sentence = _cause(failure)
    if failure.exitcode == LEFT:
        return Outcome(LEFT, sentence)
    if told.signal is not None and failure.exitcode == -told.signal:
        said = signal.Signals(told.signal).name
        return Outcome(LEFT, f"told to leave by {said} before training had begun; nothing was lost")
    is_wrong = kind in WRONG_WORK
    if failure.exitcode != REFUSED and not is_wrong and kind not in LOST_WORK:
        sentence = str(error).strip()
    elif not sentence.startswith(f"rank {rank}: "):
        sentence = f"rank {rank}: {sentence}"
    if is_wrong or failure.exitcode > 0:
        # Only a rank that says what went wrong has come out wrong.
        code = CAME_OUT_WRONG if is_wrong else 1 if failure.exitcode == CAME_OUT_WRONG else failure.exitcode
        return Outcome(code, sentence)
    return Outcome(128 - failure.exitcode, sentence)


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
