"""A run on two nodes whose processes are killed, stopped and told to leave at random is the run that nobody disturbed.

    make soak                       200 events, an hour on two cores
    SOAK_EVENTS=20 SOAK_OUT=soak.json .venv/bin/python -m pytest -m soak tests/integration/test_soak.py

The harness is what a scheduler would be: it starts a launcher again that is gone, unless the run was refused.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from blt_titan.checkpoint.load import fill_state
from blt_titan.checkpoint.read import SafeReader
from blt_titan.checkpoint.steps import complete_steps
from tests.helpers.training_runs import losses

pytestmark = [pytest.mark.soak, pytest.mark.full, pytest.mark.timeout(4 * 3600)]

EVENTS = int(os.environ.get("SOAK_EVENTS", "200"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
OUT = os.environ.get("SOAK_OUT")
ENDLESS = 1_000_000
KINDS = (
    *("kill a rank", "kill a rank", "kill a launcher", "kill a loader worker", "stop a rank for two seconds"),
    *("SIGTERM to a launcher", "SIGUSR1 to a rank", "SIGINT to a launcher"),
)
KINDLY = ("SIGTERM to a launcher", "SIGUSR1 to a rank", "SIGINT to a launcher")
GROWTH_MIB, GROWTH_OPEN = 40, 8
"""What a launcher, or a rank at its third step, may have more at the end than at the beginning: room for allocators."""


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(status.parent.name))
    return found


def takes(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return {
        "memory_mib": int(fields["VmRSS"].split()[0]) // 1024,
        "threads": int(fields["Threads"]),
        "open": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


class Soak:
    """Two nodes of a rank each, and what happens to them."""

    def __init__(self, folder: Path, small_run: list[str]):
        self.folder, self.out = folder, folder / "soaked"
        with socket.socket() as free:
            free.bind(("", 0))
            self.port = free.getsockname()[1]
        self.settings = [
            *("debug", *small_run, "--training.dataloader.num_workers=1", "--checkpoint.interval=5"),
            f"--lr_scheduler.total_steps={ENDLESS}",
        ]
        self.launchers: dict[int, subprocess.Popen] = {}
        self.codes: Counter[str] = Counter()
        self.random = random.Random(SEED)

    def start(self, node: int) -> None:
        command = [
            *(sys.executable, "-m", "blt_titan", "train", *self.settings, f"--job.dump_folder={self.out}"),
            *(f"--training.steps={ENDLESS}", "--nproc=1", "--nnodes=2", f"--node-rank={node}"),
            *("--master-addr=localhost", f"--master-port={self.port}", "--rendezvous-timeout=120"),
            f"--max-restarts={ENDLESS}",
        ]
        log = (self.folder / f"node{node}.log").open("a")
        self.launchers[node] = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def keep_alive(self) -> None:
        for node in (0, 1):
            process = self.launchers.get(node)
            if process is None:
                self.start(node)
            elif (code := process.poll()) is not None:
                self.codes[str(code)] += 1
                assert code not in (0, 2, 3), (node, code, (self.folder / f"node{node}.log").read_text()[-3000:])
                self.start(node)

    def ranks(self) -> dict[int, int]:
        found = {}
        for node, process in self.launchers.items():
            for pid in children(process.pid):
                try:
                    if b"blt_titan.train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                        found[node] = pid
                except OSError:
                    continue
        return found

    def step(self) -> int:
        """The last step that metrics tell of."""
        try:
            with (self.out / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = [line for line in file.read().split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
            return json.loads(lines[-1])["step"] if lines else 0
        except (OSError, ValueError):
            return 0

    def await_training(self) -> None:
        """Wait until both ranks have made steps since the last event."""
        deadline, before, ranks = time.monotonic() + 300, None, None
        while True:
            self.keep_alive()
            if ranks != (now := self.ranks()) or len(now) < 2:
                before, ranks = None, now
            elif before is None:
                before = self.step()
            elif self.step() >= before + 3:
                return
            assert time.monotonic() < deadline, {n: (self.folder / f"node{n}.log").read_text()[-2000:] for n in (0, 1)}
            time.sleep(0.1)

    def disturb(self, kind: str) -> None:
        node = self.random.randrange(2)
        rank, launcher = self.ranks().get(node), self.launchers[node].pid
        if rank is None:
            return
        time.sleep(self.random.uniform(0, 1.5))
        victim = {"rank": rank, "launcher": launcher}.get(kind.split()[-1], rank)
        try:
            match kind:
                case "kill a loader worker":
                    os.kill(self.random.choice(children(rank) or [rank]), signal.SIGKILL)
                case "stop a rank for two seconds":
                    os.kill(rank, signal.SIGSTOP)
                    time.sleep(2)
                    os.kill(rank, signal.SIGCONT)
                case _ if kind.startswith("kill"):
                    os.kill(victim, signal.SIGKILL)
                case _:
                    os.kill(victim, signal.Signals[kind.split()[0]])
        except ProcessLookupError:
            return
        if kind in KINDLY:
            for process in self.launchers.values():
                process.wait(timeout=120)

    def end(self) -> int:
        """Tell the run to leave; return the step that it saved."""
        self.await_training()
        self.launchers[0].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=120) for process in self.launchers.values()] == [75, 75]
        return max(complete_steps(self.out / "checkpoint"))

    def close(self) -> None:
        for process in self.launchers.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def whole_state(checkpoint: Path) -> dict[str, Any]:
    """Everything that a checkpoint holds, but for the settings of its run."""
    metadata = SafeReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.items()
        if not name.endswith(".settings")
    }
    fill_state(state, checkpoint)
    return state


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not equal, bit for bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        return bool((a == b).all()) if hasattr(a, "all") else a == b

    return [name for name in sorted(one.keys() | other.keys()) if not same(one[name], other[name])]


def test_a_run_that_is_disturbed_at_random_is_the_undisturbed_run(small_run, tmp_path):
    soak = Soak(tmp_path, small_run)
    happened: Counter[str] = Counter()
    launcher, rank = [], []
    began = time.monotonic()
    try:
        for _ in range(EVENTS):
            soak.await_training()
            launcher.append(takes(soak.launchers[0].pid))
            rank.append(takes(soak.ranks()[0]))
            kind = soak.random.choice(KINDS)
            soak.disturb(kind)
            happened[kind] += 1
        last = soak.end()
    finally:
        soak.close()
    soaked_s = time.monotonic() - began
    straight = tmp_path / "straight"
    command = [sys.executable, "-m", "blt_titan", "train", *soak.settings, "--nproc=2", "--checkpoint.interval=1000000"]
    command += [f"--job.dump_folder={straight}", f"--training.steps={last}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = losses(straight), losses(soak.out)
    wrong_losses = [step for step in one if one[step] != other.get(step)]
    wrong_state = differences(
        whole_state(straight / f"checkpoint/step-{last}"), whole_state(soak.out / f"checkpoint/step-{last}")
    )
    result = {
        "events": dict(happened),
        "launcher_exit_codes": dict(soak.codes),
        "seconds": round(soaked_s),
        "steps": last,
        "steps_whose_loss_differs": len(wrong_losses),
        "tensors_and_positions_that_differ": len(wrong_state),
        "launcher_of_node_0": {"first": launcher[0], "last": launcher[-1]},
        "rank_0": {"first": rank[0], "last": rank[-1]},
        "seed": SEED,
    }
    print(json.dumps(result, indent=2))
    if OUT:
        Path(OUT).write_text(json.dumps(result, indent=2) + "\n")
    assert list(other) == list(range(1, last + 1)), "a step is missing, or was not taken back"
    assert not wrong_losses, f"from step {wrong_losses[0]} on"
    assert not wrong_state
    for one_of in (launcher, rank):
        first, end = one_of[0], one_of[-1]
        assert end["memory_mib"] <= first["memory_mib"] + GROWTH_MIB
        assert end["open"] <= first["open"] + GROWTH_OPEN
        assert end["threads"] <= first["threads"] + GROWTH_OPEN
