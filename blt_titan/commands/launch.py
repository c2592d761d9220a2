"""Start the ranks of a training run on this node, again where that may help, and end as they end.

In: how many ranks and nodes, and the arguments of `blt_titan.train`. Out: an exit code, the same on all nodes.

A run that failed goes on from its newest complete checkpoint, by itself as often as --max-restarts allows: counted are
failures without a new checkpoint between them, so that a fault that comes back at the same step ends the run, and
the tenth lost machine in a month does not.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blt_titan.checkpoint.steps import complete_steps
from blt_titan.commands.nodes import Nodes, NodesError, Verdict
from blt_titan.commands.ranks import (
    EndedBySignalError,
    Outcome,
    Ranks,
    Told,
    ToldTooEarlyError,
    run_ranks,
    signal_ranks,
)
from blt_titan.training.exit_codes import LEFT

MEETING_S = 900.0
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0
"""Seconds before the first restart; each further one without a checkpoint waits twice as long, up to the longest."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads the settings of its GPU allocator from; the second is the name of old."""


@dataclass(frozen=True)
class Restarts:
    """How often a run that failed is started again."""

    most: int = 0
    """Failures without a new checkpoint between them after which it is."""
    checkpoints: Path | None = None
    """The folder of the run's checkpoints."""

    def newest_step(self) -> int:
        """Return the newest complete step; -1 where there is none."""
        return -1 if self.checkpoints is None else max(complete_steps(self.checkpoints), default=-1)


def launch(
    name: str,
    ranks: Ranks,
    arguments: Sequence[str],
    *,
    restarts: Restarts | None = None,
    meeting_s: float = MEETING_S,
    log_folder: Path | None = None,
) -> int:
    """Start the ranks, wait for them, and return the exit code of the job.

    Args:
        name: of the command, which messages begin with.
        ranks: how many, and where.
        arguments: of each rank, as `blt_titan.train` takes them.
        restarts: how often they are started again; on several nodes what node 0 says counts.
        meeting_s: seconds in which the launchers of all nodes must be there.
        log_folder: what the ranks print goes to a new folder in there too.

    Returns:
        0, `preemption.EXIT_CODE` if the run was told to leave, or the code of the first rank that failed.
    """
    _set_environment(ranks)
    judge = _Judge(restarts or Restarts())
    told = Told()
    try:
        with told.passed_on(), _nodes(ranks, meeting_s) as nodes:
            while True:
                port = nodes.meet() if nodes else None
                with nodes.watched() if nodes else contextlib.nullcontext():
                    outcome = run_ranks(ranks, arguments, told, port=port, log_folder=_new_folder(log_folder, ranks))
                with told.noted():
                    outcome = replace(outcome, was_told=told.signal is not None)
                    verdict = nodes.settle(outcome, judge) if nodes else judge(outcome)
                    _say(name, verdict)
                    if verdict.again_after_s is None:
                        return verdict.outcome.code
                if told.signal is not None:
                    raise ToldTooEarlyError(signal.Signals(told.signal).name)
                time.sleep(verdict.again_after_s)
    except ToldTooEarlyError as early:
        print(f"{name}: told to leave by {early}; no rank was running", file=sys.stderr)
        return LEFT
    except EndedBySignalError as end:
        print(f"{name}: ended by {end}", file=sys.stderr)
        return 128 + end.number
    except NodesError as error:
        print(f"{name}: {'' if error.code == LEFT else 'error: '}{error}", file=sys.stderr)
        return error.code


def tell_other_nodes(ranks: Ranks, sentence: str, meeting_s: float) -> None:
    """Have the launchers of other nodes know that this one does not start, so that they need not wait.

    Args:
        ranks: of the job.
        sentence: what is wrong here.
        meeting_s: seconds to wait for node 0, a minute at most.
    """
    with contextlib.suppress(NodesError), _nodes(ranks, min(meeting_s, 60.0)) as nodes:
        if nodes:
            nodes.refuse(sentence)


@contextlib.contextmanager
def _nodes(ranks: Ranks, meeting_s: float) -> Iterator[Nodes | None]:
    """Give the launchers of the job's nodes; None if there is one."""
    if ranks.nnodes == 1:
        yield None
        return
    nodes = Nodes(ranks, meeting_s, lambda: signal_ranks(signal.SIGKILL))
    try:
        yield nodes
    except ToldTooEarlyError as early:
        nodes.leave(str(early))
        raise
    finally:
        nodes.close()


class _Judge:
    """Says what follows from the end of an attempt, and keeps count."""

    def __init__(self, restarts: Restarts):
        self._restarts = restarts
        self._failures = 0
        self._newest = restarts.newest_step()

    def __call__(self, outcome: Outcome) -> Verdict:
        if not outcome.is_worth_a_restart:
            return Verdict(outcome)
        newest = self._restarts.newest_step()
        if newest > self._newest:
            self._newest, self._failures = newest, 0
        self._failures += 1
        if self._failures > self._restarts.most:
            if not self._restarts.most:
                return Verdict(outcome)
            return Verdict(outcome, said=f"{self._failures} failures without a new checkpoint: not started again")
        wait_s = min(FIRST_WAIT_S * 2 ** (self._failures - 1), LONGEST_WAIT_S)
        where = f"from step {newest}" if newest >= 0 else "from the beginning"
        again = f"starting again in {wait_s:g} s {where}, restart {self._failures} of {self._restarts.most}"
        return Verdict(outcome, wait_s, again)


def _say(name: str, verdict: Verdict) -> None:
    outcome = verdict.outcome
    if outcome.code == LEFT:
        print(f"{name}: {outcome.sentence}", file=sys.stderr)
    elif outcome.code:
        print(f"{name}: error: {outcome.sentence}", file=sys.stderr)
    if verdict.said:
        print(f"{name}: {verdict.said}", file=sys.stderr, flush=True)


def _new_folder(log_folder: Path | None, ranks: Ranks) -> Path | None:
    if log_folder is None:
        return None
    node = f"-node{ranks.node_rank}" if ranks.nnodes > 1 else ""
    return log_folder / f"{time.strftime('%Y%m%d-%H%M%S')}{node}"


def _set_environment(ranks: Ranks) -> None:
    # A run's folder says with how many ranks it was started.
    os.environ.update(NGPU=str(ranks.nproc), NNODES=str(ranks.nnodes))
    # Lines say which rank of the job they are of, not of the node.
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[${role_name}${rank}]:")
    # Threads that wait should sleep: spinning on cores that another process wants made steps 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not any(name in os.environ for name in _ALLOCATOR):
        # What one phase of a step frees can then serve another that asks for other sizes.
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
