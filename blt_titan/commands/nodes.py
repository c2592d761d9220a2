"""The nodes of a job meet before their ranks do, and agree on how an attempt ended.

Each node has one launcher; node 0's holds a store (c10d's TCPStore, at --master-addr and --master-port) for as long as
it lives. An attempt, a start of all ranks, goes like this:

    here       every launcher says that it is there. Who is missing when the time is up is named, and nothing starts.
    go         node 0 says at which port the ranks meet: another one in each attempt, so that none meets a dead peer
    failed     the first node whose ranks fail says so, and node 0 of a launcher that is silent; the other nodes end
               their ranks, which would wait for the dead in a collective
    out        every launcher says how its ranks ended
    verdict    node 0 says how the job ended, and whether there is another attempt

A launcher that comes when its node is here already takes the place of one that gives no sign of life: it has the
attempt failed, and is there for the next.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from blt_titan.commands.bounded_store import BoundedStore, SilentStoreError
from blt_titan.commands.ranks import DEFAULT_PORT, Outcome, Ranks
from blt_titan.training.exit_codes import CAME_OUT_WRONG, LEFT, REFUSED

LOOK_S, BEAT_S, SILENT_S = 1.0, 5.0, 60.0
"""Seconds between looks of a launcher, between its signs of life, and after which node 0, or it node 0, is taken for
dead."""
GRACE_S = 10.0
"""What ranks have, after those of another node failed, to say themselves what is wrong."""
SETTLE_S = 60.0
"""What launchers have to end their ranks and say so, once the attempt has failed."""
_POLL_S = 0.2
_CLOSE_S = 2.0
"""What threads have to end; one that waits for a silent store is left to the end of the process."""


class NodesError(RuntimeError):
    """The nodes did not meet, or one is gone; the message names it.

    Attributes:
        code: exit code of the launchers; `REFUSED` where the settings of a node are at fault.
    """

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended for the whole job."""

    outcome: Outcome
    again_after_s: float | None = None
    """Seconds to wait before the next attempt; None if there is none."""
    said: str = ""
    """What is said of the next attempt."""


Judge = Callable[[Outcome], Verdict]
"""Says, on node 0, what follows from how the job ended."""


def joint(outcomes: dict[int, Outcome], failed: tuple[int, Outcome] | None) -> Outcome:
    """Return how a job ended whose nodes ended so.

    What the user must mend goes first, then that the run was told to leave, then the first failure. If a launcher was
    told to leave, the job was.

    Args:
        outcomes: of the nodes, those that said so.
        failed: the first that failed.
    """
    by_weight = (one for code in (REFUSED, CAME_OUT_WRONG, LEFT) for one in outcomes.values() if one.code == code)
    first_failed = failed[1] if failed else next((one for one in outcomes.values() if one.code), Outcome(0))
    return replace(next(by_weight, first_failed), was_told=any(one.was_told for one in outcomes.values()))


class Nodes:
    """A launcher's place among those of a job's nodes.

    Args:
        ranks: of the job; at least two nodes.
        seconds: that nodes have to meet, in the first attempt and in each other.
        end_ranks: ends the ranks of this node at once.

    Raises:
        NodesError: node 0 does not answer.
    """

    def __init__(self, ranks: Ranks, seconds: float, end_ranks: Callable[[], Any]):
        self._ranks, self._seconds, self._end_ranks = ranks, seconds, end_ranks
        self._me, self._others = ranks.node_rank, [n for n in range(ranks.nnodes) if n != ranks.node_rank]
        self._host, self._port = ranks.master_addr or "localhost", ranks.master_port or DEFAULT_PORT
        self._attempt = self._beats = 0
        self._lost: str | None = None
        self._connect()
        self._ended, self._ranks_run = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Give no more signs of life."""
        self._ended.set()
        self._watcher.join(LOOK_S + _CLOSE_S)
        self._store.close(_CLOSE_S)

    def _connect(self) -> None:
        deadline = time.monotonic() + self._seconds
        while True:
            left = max(1.0, deadline - time.monotonic())
            try:
                # The store's own limit, with its reason, goes first.
                self._store = BoundedStore(lambda left=left: self._open(left), left + _CLOSE_S, SILENT_S)
                return
            except (DistError, OSError, ValueError, SilentStoreError) as error:
                if not self._me:
                    raise NodesError(
                        f"node 0 cannot listen at {self._host}:{self._port}, --master-addr and --master-port: "
                        f"{_first_line(error)}"
                    ) from error
                if time.monotonic() >= deadline - 0.5:
                    raise NodesError(
                        f"node 0 does not answer at {self._host}:{self._port}, --master-addr and --master-port, within "
                        f"{self._seconds:g} s: is its launcher started?"
                    ) from error
                time.sleep(_POLL_S)

    def _open(self, seconds: float) -> TCPStore:
        limit = timedelta(seconds=seconds)
        return TCPStore(self._host, self._port, is_master=not self._me, timeout=limit, wait_for_workers=False)

    def meet(self) -> int:
        """Wait until all launchers are there; return the port of node 0 where their ranks meet.

        Raises:
            NodesError: one is missing when the time is up, or its node refused the settings.
        """
        deadline = time.monotonic() + self._seconds
        with self._answering():
            if not self._me:
                self._attempt += 1
                self._store.set("attempt", str(self._attempt))
                self._store.set(self._key("here", 0), socket.gethostname())
                return self._call_the_roll(deadline)
            self._take_a_place(deadline)
            self._wait_for(self._key("go"), deadline)
            go = json.loads(self._store.get(self._key("go")))
            if "port" not in go:
                self._store.add(self._key("heard"), 1)
                raise NodesError(**go)
            return go["port"]

    def _take_a_place(self, deadline: float) -> None:
        """Say that this node is here, in an attempt where none of its number was before."""
        last = self._attempt
        while True:
            self._wait_for("attempt", deadline)
            self._attempt = int(self._store.get("attempt"))
            if self._attempt == last:
                self._pause(deadline)
            elif self._store.add(self._key("came", self._me), 1) == 1:
                self._store.set(self._key("here", self._me), socket.gethostname())
                return
            else:
                last = self._attempt
                self._replace(deadline)

    def _replace(self, deadline: float) -> None:
        """Have the attempt failed whose launcher of this node is dead."""
        # Signs of life go on by themselves, here too: others are those that this launcher did not give.
        before, silent_at = self._store.add(f"beat/{self._me}", 0) - self._beats, time.monotonic() + SILENT_S
        while time.monotonic() < min(silent_at, deadline) and int(self._store.get("attempt")) == self._attempt:
            if self._store.add(f"beat/{self._me}", 0) - self._beats > before + 1:
                raise NodesError(
                    f"--node-rank {self._me}: {self._name(self._me, here=False)} is alive, started by another launcher"
                )
            time.sleep(_POLL_S)
        gone = f"node {self._me} was lost: another launcher, on {socket.gethostname()}, takes its place"
        self._say_failed(Outcome(1, gone))

    def _call_the_roll(self, deadline: float) -> int:
        while True:
            left = [node for node in self._others if self._store.check([f"left/{node}"])]
            if left:
                self._send_home(self._store.get(f"left/{left[0]}").decode(), LEFT, GRACE_S)
            missing = [node for node in self._others if not self._store.check([self._key("here", node)])]
            if not missing:
                break
            refused = [node for node in missing if self._store.check([f"refused/{node}"])]
            if refused:
                self._send_home(self._store.get(f"refused/{refused[0]}").decode(), REFUSED, GRACE_S)
            if time.monotonic() > deadline:
                self._send_home(self._missing(missing), 1, GRACE_S)
            time.sleep(_POLL_S)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self._store.set(self._key("go"), json.dumps({"port": port}))
        return port

    def _send_home(self, sentence: str, code: int, wait_s: float) -> NoReturn:
        """Have nothing start, and keep the store until the others know why, or the wait is over."""
        self._store.set(self._key("go"), json.dumps({"sentence": sentence, "code": code}))
        self._await_heard(len([node for node in self._others if self._store.check([self._key("here", node)])]), wait_s)
        raise NodesError(sentence, code)

    def _await_heard(self, by: int, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while self._store.add(self._key("heard"), 0) < by and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _wait_for(self, key: str, deadline: float) -> None:
        while not self._store.check([key]):
            self._pause(deadline)

    def _pause(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            missing = [node for node in self._others if not self._store.check([self._key("here", node)])]
            raise NodesError(self._missing(missing) if missing else f"node 0 starts nothing within {self._seconds:g} s")
        time.sleep(_POLL_S)

    def _missing(self, missing: list[int]) -> str:
        here = {
            node: self._store.get(self._key("here", node)).decode()
            for node in range(self._ranks.nnodes)
            if node not in missing and self._store.check([self._key("here", node)])
        }
        there = ", ".join(f"{node} ({host})" for node, host in list(here.items())[:8])
        return (
            f"{_numbers(missing)} of {self._ranks.nnodes} did not come within {self._seconds:g} s; here: "
            f"{there}{', ...' if len(here) > 8 else ''}. Start it there with the same --master-addr and --master-port "
            "and its own --node-rank"
        )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While ranks run: end them when those of another node have failed."""
        self._ranks_run.set()
        try:
            yield
        finally:
            self._ranks_run.clear()

    def _watch(self) -> None:
        """Give signs of life, and look at those of others."""
        heard: dict[int, tuple[int, float]] = {}
        next_beat, ends_at = 0.0, None
        while not self._ended.wait(LOOK_S) and self._lost is None:
            now, failed = time.monotonic(), False
            try:
                with self._answering():
                    if now >= next_beat:
                        self._beats += 1
                        self._store.add(f"beat/{self._me}", 1)
                        next_beat = now + BEAT_S
                    if self._ranks_run.is_set():
                        if not self._me:
                            self._look_for_silence(heard, now, self._others)
                        failed = self._store.check([self._key("failed")])
            except NodesError as error:
                self._lost = str(error)
                self._end_ranks()
            if not failed:
                ends_at = None
            elif ends_at is None:
                ends_at = now + GRACE_S
            elif now >= ends_at:
                self._end_ranks()

    def _look_for_silence(self, heard: dict[int, tuple[int, float]], now: float, nodes: list[int]) -> set[int]:
        """Say of the nodes that are silent that they failed, and return them."""
        silent = set()
        for node in nodes:
            beat, since = self._store.add(f"beat/{node}", 0), heard.get(node, (-1, now))
            heard[node] = (beat, now) if beat != since[0] else since
            if now - heard[node][1] > SILENT_S and not self._store.check([self._key("out", node)]):
                self._say_failed(Outcome(1, f"{self._name(node)} gives no sign of life for {SILENT_S:g} s"))
                silent.add(node)
        return silent

    def settle(self, outcome: Outcome, judge: Judge) -> Verdict:
        """Say how the ranks of this node ended, and return how the job did.

        Raises:
            NodesError: node 0 is gone.
        """
        if self._lost is not None:
            raise NodesError(self._lost)
        with self._answering():
            if outcome.code not in (0, LEFT):
                named = f"{self._name(self._me)}: {outcome.sentence}"
                self._say_failed(Outcome(outcome.code, named))
            self._store.set(self._key("out", self._me), json.dumps(asdict(outcome)))
            if self._me:
                while not self._store.check([self._key("verdict")]):
                    time.sleep(_POLL_S)
                said = json.loads(self._store.get(self._key("verdict")))
                self._store.add(self._key("heard"), 1)
                return Verdict(Outcome(**said.pop("outcome")), **said)
            outcomes = self._collect()
            verdict = judge(joint(outcomes, self._failed()))
            self._store.set(self._key("verdict"), json.dumps(asdict(verdict)))
            self._await_heard(len(outcomes) - 1, GRACE_S)
            return verdict

    def _collect(self) -> dict[int, Outcome]:
        """Return what the nodes say of their end, as soon as all but silent ones have, or the time is up."""
        outcomes: dict[int, Outcome] = {}
        heard: dict[int, tuple[int, float]] = {}
        deadline = None
        while True:
            for node in range(self._ranks.nnodes):
                if node not in outcomes and self._store.check([self._key("out", node)]):
                    outcomes[node] = Outcome(**json.loads(self._store.get(self._key("out", node))))
            now, missing = time.monotonic(), [node for node in self._others if node not in outcomes]
            if self._look_for_silence(heard, now, missing) == set(missing):
                return outcomes
            if deadline is None and (self._failed() or any(one.code for one in outcomes.values())):
                deadline = now + SETTLE_S
            if deadline is not None and now > deadline:
                return outcomes
            time.sleep(_POLL_S)

    def refuse(self, sentence: str) -> None:
        """Have the other nodes know that this one does not start, and why."""
        with contextlib.suppress(NodesError), self._answering():
            said = f"{self._name(self._me)}: {sentence}"
            if self._me:
                self._store.set(f"refused/{self._me}", said)
                return
            self._attempt += 1
            self._store.set("attempt", str(self._attempt))
            self._store.set(self._key("go"), json.dumps({"sentence": said, "code": REFUSED}))
            self._await_heard(len(self._others), GRACE_S)

    def leave(self, signal_name: str) -> None:
        """Have the other nodes know that this one was told to leave while no rank ran, so that they do too."""
        if not self._me:
            return
        said = f"{self._name(self._me)} was told to leave by {signal_name}"
        self._store.answer_s = _CLOSE_S
        with contextlib.suppress(NodesError), self._answering():
            self._store.set(f"left/{self._me}", said)
            # Ranks may run elsewhere, and wait for those of this node.
            if self._store.check([self._key("go")]) and not self._store.check([self._key("out", self._me)]):
                self._store.set(self._key("out", self._me), json.dumps(asdict(Outcome(LEFT, said))))
                self._say_failed(Outcome(LEFT, said))

    def _say_failed(self, outcome: Outcome) -> None:
        said = json.dumps([self._me, asdict(outcome)])
        self._store.compare_set(self._key("failed"), "", said)

    def _failed(self) -> tuple[int, Outcome] | None:
        if not self._store.check([self._key("failed")]):
            return None
        node, outcome = json.loads(self._store.get(self._key("failed")))
        return node, Outcome(**outcome)

    def _name(self, node: int, *, here: bool = True) -> str:
        key = self._key("here", node)
        if node == self._me and here:
            return f"node {node} ({socket.gethostname()})"
        return f"node {node} ({self._store.get(key).decode()})" if self._store.check([key]) else f"node {node}"

    def _key(self, what: str, node: int | None = None) -> str:
        return f"{self._attempt}/{what}" if node is None else f"{self._attempt}/{what}/{node}"

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except DistError as error:
            raise NodesError(f"node 0 ({self._host}:{self._port}) is gone: {_first_line(error)}") from error
        except SilentStoreError as error:
            raise NodesError(
                f"node 0 ({self._host}:{self._port}) gives no answer for {SILENT_S:g} s: "
                "its machine is gone or its launcher is stopped"
            ) from error


def _numbers(nodes: list[int]) -> str:
    shown = ", ".join(map(str, nodes[:16])) + (", ..." if len(nodes) > 16 else "")
    return f"node{'s' if len(nodes) > 1 else ''} {shown}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
