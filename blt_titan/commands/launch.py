"""Start the ranks of a training run on this node with torchrun's own launcher, and end as they end.

In: how many ranks and nodes, and the arguments of `blt_titan.train`. Out: an exit code.

The decision that is not obvious: torchrun is called as a function and not as a program, with the options that its
command line has. Its program answers Ctrl-C, and every rank that fails, with tracebacks, and gives 1 for any of them.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

RANK_MODULE = "blt_titan.train"
DEFAULT_PORT = 29500
_REFUSED = 2
"""How a rank ends when settings or data are at fault; its message is a sentence."""
FAILED_WORK = ("NonFiniteLossError", "RowsDifferError", "ExportFailedError")
"""Errors of `blt_titan.train.FAILED_WORK` by name: exit code 1, as of a fault of the program, but with a sentence."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads the settings of its GPU allocator from; the second is the name of old."""
_TALKATIVE = ("agent.server.api", "multiprocessing.api")
"""Modules of torchrun's that warn of each process that they end."""


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
            # Ctrl-C is not torchrun's: it would pass it on, for each rank to answer with a traceback.
            "--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT",
        ]


def launch(name: str, ranks: Ranks, arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code of the first that failed.

    Args:
        name: of the command, which messages begin with.
        ranks: how many, and where.
        arguments: of each rank, as `blt_titan.train` takes them.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the ranks have ended.
    """
    # A run's folder says with how many ranks it was started.
    os.environ.update(NGPU=str(ranks.nproc), NNODES=str(ranks.nnodes))
    # Threads that wait should sleep: spinning on cores that another process wants made steps 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not any(name in os.environ for name in _ALLOCATOR):
        # What one phase of a step frees can then serve another that asks for other sizes.
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    for module in _TALKATIVE:
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.ERROR)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_ranks)
    try:
        torchrun.run(torchrun.parse_args([*ranks.torchrun_options(), "-m", RANK_MODULE, *arguments]))
    except _Interrupt:
        raise KeyboardInterrupt from None
    except SignalException as end:
        number = int(end.sigval)
        print(f"{name}: ended by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        kind, sentence = _cause(failure)
        if failure.exitcode != _REFUSED and kind not in FAILED_WORK:
            sentence = str(error).strip()
        elif not sentence.startswith(f"rank {rank}: "):
            sentence = f"rank {rank}: {sentence}"
        print(f"{name}: error: {sentence}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


class _Interrupt(SignalException):
    """Ctrl-C. Torchrun ends the ranks by SIGTERM, at which they leave without a word."""

    def __init__(self) -> None:
        super().__init__("Ctrl-C", signal.SIGTERM)


def _end_ranks(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough, the ranks are being ended
    raise _Interrupt


def _cause(failure: ProcessFailure) -> tuple[str, str]:
    """Return the class and the sentence of the error that ended a rank; no class where it recorded none."""
    said: Any = failure.message
    text = str(said["message"] if isinstance(said, dict) else said).strip().splitlines()[-1]
    kind, _, sentence = text.partition(": ")
    return (kind, sentence) if kind.endswith("Error") and sentence else ("", text)
