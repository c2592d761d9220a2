"""A watch beside the training of each rank: says which rank holds up a run that hangs, and ends it.

A collective that gives up blames the rank that waits. The watch looks at all heartbeats a little earlier, finds the
rank that the others wait for (`laggards.py`), prints where each stands, with stacks, and ends the run with a sentence
that names that rank, and exit code 1. What a collective raises when a peer died, or was waited for in vain, is put in
the same words.

The decisions that are not obvious: time is counted in beats of the watch and not by the clock, so that a job which is
stopped as a whole and goes on is no hang. Nothing is ended while a rank that the others wait for still moves. And the
ranks of a node that answer no more are killed by whoever reports them: torchrun would ask a stopped process to end, and
wait 30 s for it.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from blt_titan.config.run_config import RunConfig
from blt_titan.monitor.record import RunRecord
from blt_titan.titan import logger
from blt_titan.training.error_causes import is_of_a_collective
from blt_titan.training.heartbeat import (
    LONG_PHASES,
    UNWATCHED_PHASES,
    Heartbeat,
    Pulse,
    memory_file,
    process_state,
)
from blt_titan.training.laggards import laggards, named, seconds_there, where_ranks_stand
from blt_titan.training.patience import default_limit_s
from blt_titan.training.peers import Peers

_BEATS = 30
"""The watch looks so many times within the limit,"""
_LOOK_BACK_BEATS = 4
"""and at others so many beats before its end, or more of many ranks, to see which look at themselves still."""
_ENDLESS_FACTOR = 3
"""Without a limit of the user's, ranks of which none is behind are given so many times as long."""
_STACK_BYTES = 6000
_MEGABYTE = 1 << 20
_STATES = {"T": "its process is stopped", "D": "its process waits for a disk or a mount"}


class HungError(RuntimeError):
    """A rank does not get on, and the others wait for it."""


class PeerLostError(RuntimeError):
    """A collective failed because of another rank."""


class HangWatch:
    """Watches this rank and, when it waits, the others.

    Args:
        heartbeat: of this rank's training.
        limit_s: seconds in which something must move in a step; None to take `default_limit_s`.
        train_timeout_s: after which a collective of a step gives up.
        init_timeout_s: the same until the first step is made.
        folder: to write reports to.
        record: told how the run ended where the watch ends it.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        *,
        limit_s: float | None,
        train_timeout_s: float,
        init_timeout_s: float,
        folder: Path,
        record: RunRecord,
    ):
        self._heartbeat, self._record = heartbeat, record
        self._is_users = limit_s is not None
        self._limit_s = limit_s or default_limit_s(train_timeout_s)
        self._long_limit_s = max(self._limit_s, default_limit_s(init_timeout_s))
        self._folder = folder
        self._beat_s = self._limit_s / _BEATS
        self._stacks = memory_file("stacks")
        if self._stacks >= 0:
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._own = Pulse(rank, socket.gethostname(), os.getpid(), page=heartbeat.descriptor, stacks=self._stacks)
        self._peers = Peers(rank, world_size, self._beat_s)
        self._look_back_s = max(_LOOK_BACK_BEATS * self._beat_s, 2 * self._peers.round_s)
        self._seen: tuple[Any, ...] = ()
        self._moved_bytes = 0
        self._before: dict[int, Pulse] = {}
        self._looked_at_s = self._warned_s = 0.0
        self._rounds = 0
        self._concluding = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def begin(self) -> None:
        """Begin to watch."""
        self._look_at_own(0.0)
        self._peers.begin(self._own)
        self._thread.start()

    def end(self) -> None:
        """Watch no more."""
        self._stop.set()
        self._thread.join(1.0)
        self._peers.end()

    def lost_peer(self, error: BaseException) -> PeerLostError | None:
        """Return what a collective's error is about, if it is one and another rank is its cause."""
        if self._peers.world_size == 1 or not is_of_a_collective(error):
            return None
        with self._concluding:
            self._peers.ask(all_ranks=True)
            time.sleep(2 * self._beat_s)
            self._wait(2 * (self._peers.round_s - self._beat_s))
            before, rounds = self._peers.read(), self._peers.rounds
            has_waited = self._wait(self._look_back_s)
            # Ranks whose end this one hears of first are given time to be heard by their launcher.
            time.sleep(1.5)
            now, gone = self._peers.read(), self._peers.gone()
            now = {rank: pulse for rank, pulse in now.items() if rank in before}
            silent = [rank for rank in now if rank in gone or before[rank].beats == now[rank].beats]
            late = laggards(before, now, gone) if gone or (has_waited and self._is_news(rounds)) else []
            late = [rank for rank in late if rank != self._own.rank]
            if gone:
                late = gone
            if not late:
                return None
            why = str(error).strip().splitlines()[-1]
            sentence = f"rank {self._own.rank}: a collective failed because of others: {self._said(late, now, silent)}"
            self._report(f"A collective failed ({why})", late, now, sentence, reports=self._reporter(before, now, gone))
            return PeerLostError(sentence)

    def _watch(self) -> None:
        try:
            self._watch_steps()
        except Exception as error:
            # The training goes on without, and a collective's own timeout is left.
            logger.exception(f"rank {self._own.rank} watches no more: {error}")

    def _watch_steps(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(self._beat_s):
            passed, began = time.monotonic() - began, time.monotonic()
            self._look_at_own(min(passed, 2 * self._beat_s))
            limit = self._own.limit_s
            look_back_s = self._look_back_s
            # Other nodes take a while to be heard of.
            waits = limit is not None and self._own.idle_s >= limit - 2 * look_back_s
            self._peers.ask(all_ranks=waits or self._concluding.locked())
            if limit is None or self._own.idle_s < limit - look_back_s:
                self._before, self._warned_s = {}, 0.0
            elif not self._before:
                if self._is_news(self._peers.rounds_before):
                    self._look_at_all()
            elif self._own.idle_s >= max(limit, self._looked_at_s + look_back_s):
                self._look_at_others(limit)

    def _look_at_own(self, passed_s: float) -> None:
        own, place = self._own, self._heartbeat.place
        own.step, own.moves, own.phase, own.since = place
        own.collectives = _collectives_begun()
        own.limit_s = None if own.phase in UNWATCHED_PHASES else self._limit_of(own.phase)
        seen = (own.moves, own.collectives, self._megabytes_moved() if own.phase in LONG_PHASES else 0)
        own.beats += 1
        if seen != self._seen:
            self._seen, own.idle_s, own.stack, own.last_collective = seen, 0.0, "", ""
        else:
            own.idle_s += passed_s
        if own.limit_s is not None and own.idle_s > own.limit_s / 2:
            own.stack = _stack_of_main_thread()
            own.last_collective = own.last_collective or _last_collective()
        self._heartbeat.write_seen(own)
        self._peers.tell(Pulse.from_json(own.to_json()))

    def _look_at_all(self) -> None:
        self._before, self._rounds = self._peers.read(), self._peers.rounds
        self._looked_at_s = self._own.idle_s

    def _wait(self, seconds: float) -> bool:
        """Wait, but no longer than until a rank of this node is gone; tell whether none is."""
        waited = 0.0
        while waited < seconds and not self._peers.gone():
            waited += self._beat_s
            time.sleep(self._beat_s)
        return waited >= seconds

    def _is_news(self, rounds: int) -> bool:
        """Tell whether all ranks were asked for again since so many rounds, or the store does not answer."""
        return self._peers.rounds >= rounds + 2 or self._is_store_silent()

    def _is_store_silent(self) -> bool:
        return self._peers.store_silent_s > _LOOK_BACK_BEATS * self._beat_s

    def _limit_of(self, phase: str) -> float:
        return self._long_limit_s if phase in LONG_PHASES or not self._heartbeat.warm else self._limit_s

    def _megabytes_moved(self) -> int:
        """Return a figure that grows while this process reads or writes files, as in a save."""
        with contextlib.suppress(OSError):
            words = Path("/proc/self/io").read_text().split()
            moved = sum(int(words[i]) for i in (1, 3, 9, 11))
            if moved - self._moved_bytes > _MEGABYTE:
                self._moved_bytes = moved
        return self._moved_bytes

    def _look_at_others(self, limit: float) -> None:
        now, gone = self._peers.read(), self._peers.gone()
        before = self._before
        unheard = sorted(set(range(self._peers.world_size)) - now.keys())
        if self._is_store_silent():
            self._conclude_without_store(now, gone, before, limit)
            return
        if unheard or not self._is_news(self._rounds):
            return
        if now.keys() - before.keys():
            self._look_at_all()
            return
        late = laggards(before, now, gone)
        if late:
            moving = [
                r for r in late if now[r].beats != before[r].beats and now[r].idle_s < 0.9 * (now[r].limit_s or 0)
            ]
            if not moving and not any(now[rank].limit_s is None for rank in late):
                self._conclude(late, before, now, gone)
            return
        if self._is_users or (self._peers.world_size > 1 and self._own.idle_s >= _ENDLESS_FACTOR * limit):
            self._conclude([], before, now, gone)
        elif self._own.idle_s >= self._warned_s + limit:
            self._warned_s = self._own.idle_s
            if self._own.rank == 0:
                self._print("Nothing has moved for a while, and no rank is behind", [], now)

    def _conclude_without_store(
        self, now: dict[int, Pulse], gone: list[int], before: dict[int, Pulse], limit: float
    ) -> None:
        """End the run where only this node's ranks can be looked at."""
        heard = {rank: now[rank] for rank in self._peers.node if rank in now and rank in before}
        late = laggards(before, heard, gone)
        where = f"; it was last heard of in step {now[0].step}, {now[0].phase}" if 0 in now else ""
        why = "" if late else f"the store of the run, which rank 0's node holds, does not answer{where}"
        self._conclude(late, before, now, gone, why)

    def _conclude(
        self, late: list[int], before: dict[int, Pulse], now: dict[int, Pulse], gone: list[int], why: str = ""
    ) -> None:
        """Report, and end this rank with the exit code of work that failed."""
        with self._concluding:
            reporter = self._reporter(before, now, gone)
            silent = [rank for rank in late if rank in gone or before[rank].beats == now[rank].beats]
            said = why or self._said(late, now, silent)
            sentence = f"rank {self._own.rank}: the run hangs: {said}"
            if not reporter:
                # The one that reports is to be the first that failed.
                time.sleep(2.5)
            # Its folder or its webhook may be what hangs. The first rank's sentence stands; rank 0's tells the webhook.
            recorder = threading.Thread(target=self._record.end, args=("failed", 1, sentence), daemon=True)
            recorder.start()
            self._report("The run hangs", late, now, sentence, reports=reporter)
            get_error_handler().record_exception(HungError(sentence))
            if reporter:
                time.sleep(1.1)  # torchrun compares whole seconds
                for rank in silent:
                    if rank in self._peers.node and rank != self._own.rank:
                        with contextlib.suppress(OSError):
                            os.kill(now[rank].pid, signal.SIGKILL)
            recorder.join(2.0)
            sys.stdout.flush()
            os._exit(1)

    def _reporter(self, before: dict[int, Pulse], now: dict[int, Pulse], gone: list[int]) -> bool:
        """Tell whether this rank is the first of those that answer."""
        answer = [rank for rank in now if rank not in gone and before.get(rank, now[rank]).beats != now[rank].beats]
        return self._own.rank == min(answer, default=self._own.rank)

    def _said(self, late: list[int], now: dict[int, Pulse], silent: list[int]) -> str:
        """Return in words where those stand that are late, and the others."""
        at = time.time()
        own = now[self._own.rank]
        if not late:
            return f"no rank is behind; all wait in step {own.step}, {own.phase}, for {seconds_there([own], at)}"
        parts = []
        for rank in late[:4]:
            pulse = now[rank]
            where = f"step {pulse.step}, {pulse.phase}, for {seconds_there([pulse], at)}"
            part = f"rank {rank} on {pulse.host} stands in {where}"
            if rank in silent:
                state = process_state(pulse.pid) if rank in self._peers.node else "?"
                part += f", and {_STATES.get(state, 'does not answer') if state else 'its process has ended'}"
            parts.append(part)
        more = f"; so do {len(late) - 4} more" if len(late) > 4 else ""
        others = [rank for rank in now if rank not in late]
        wait = (
            f"; {named(others)} {'wait' if len(others) > 1 else 'waits'} in step {own.step}, {own.phase}"
            if others and self._own.rank in others
            else ""
        )
        return "; ".join(parts) + more + wait

    def _report(self, title: str, late: list[int], now: dict[int, Pulse], sentence: str, *, reports: bool) -> None:
        if not reports:
            return
        lines = self._print(title, late, now)
        path = self._folder / f"hang-step-{now[self._own.rank].step}.txt"

        def write() -> None:
            with contextlib.suppress(OSError):  # it may be what hangs
                path.write_text("\n".join([time.strftime("%F %T"), sentence, *lines]) + "\n")

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(2.0)

    def _print(self, title: str, late: list[int], now: dict[int, Pulse]) -> list[str]:
        """Print where all ranks stand, and stacks of those that are late or, if none is, of this one."""
        lines = [f"{title}. Where ranks stand:"]
        lines += [f"  {line}" for line in where_ranks_stand(now.values(), time.time())]
        for rank in late[:4] or [self._own.rank]:
            stack = now[rank].stack or self._ask_for_stack(now[rank])
            if stack:
                lines += [f"  stack of rank {rank}:", *(f"    {line}" for line in stack.splitlines())]
        for line in lines:
            logger.error(line)
        return lines

    def _ask_for_stack(self, pulse: Pulse) -> str:
        """Ask a process of this node for its stacks by SIGUSR2, which C code answers whatever Python does.

        The store is asked for the last that a rank of another node told.
        """
        if pulse.rank not in self._peers.node:
            return "" if self._is_store_silent() else self._peers.stack_of(pulse.rank)
        if pulse.stacks < 0 or not process_state(pulse.pid):
            return ""
        with contextlib.suppress(OSError):
            path = Path(f"/proc/{pulse.pid}/fd/{pulse.stacks}")
            before = path.read_bytes()
            os.kill(pulse.pid, signal.SIGUSR2)
            for _ in range(10):
                time.sleep(0.1)
                if len(said := path.read_bytes()) > len(before):
                    return said[len(before) :].decode(errors="replace")[:_STACK_BYTES]
        return "(it does not answer)"


def begin_hang_watch(heartbeat: Heartbeat, config: RunConfig, record: RunRecord) -> HangWatch:
    """Begin to watch a run's rank as its settings say; `record` is told if that ends the run."""
    watch = HangWatch(
        heartbeat,
        limit_s=config.heartbeat.limit_seconds,
        train_timeout_s=config.comm.train_timeout_seconds,
        init_timeout_s=config.comm.init_timeout_seconds,
        folder=Path(config.job.dump_folder),
        record=record,
    )
    watch.begin()
    return watch


def _collectives_begun() -> dict[str, int]:
    """Return how many collectives of each process group were begun, by its name and first rank."""
    begun = {}
    for group in list(dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError, KeyError):  # a backend that does not count, a group that is being made
            name = f"{group.group_name}/{dist.get_process_group_ranks(group)[0]}"
            begun[name] = cast(Any, group)._get_sequence_number_for_group()
    return begun


def _last_collective() -> str:
    """Return the name of the collective that this process began last, as far as torch's flight recorder knows."""
    for dump in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        with contextlib.suppress(Exception):  # of no importance beside what is being reported
            entries = json.loads(getattr(cast(Any, torch._C)._distributed_c10d, dump)()).get("entries", [])
            if entries:
                return str(entries[-1]["profiling_name"])
    return ""


def _stack_of_main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    return "".join(traceback.format_stack(frame))[-_STACK_BYTES:]
