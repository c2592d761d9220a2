"""Ranks that are told to leave agree on a last step, save it, and a resumed run is the run that was never told."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blt_titan.training import preemption
from blt_titan.training.preemption import EXIT_CODE, Preemption
from tests.helpers.training_runs import losses

STEPS = 14


def left_after(told_in: dict[int, int], device_type: str, ranks: int = 3, steps: int = 10) -> list[int]:
    """The step after which each rank leaves, if ranks are told within the steps of `told_in`."""
    all_of = [Preemption() for _ in range(ranks)]
    left: dict[int, int] = {}
    for step in range(1, steps + 1):
        for rank, told_step in told_in.items():
            if told_step == step:
                all_of[rank]._hear(signal.SIGTERM, None)
        summed = torch.tensor(sum(one.told for one in all_of))
        for rank, one in enumerate(all_of):
            one.note(summed)
            if one.is_due(device_type):
                left.setdefault(rank, step)
    return [left.get(rank, 0) for rank in range(ranks)]


@pytest.mark.parametrize("told_in", [{0: 4}, {2: 4}, {0: 4, 1: 4, 2: 5}])
def test_all_leave_after_the_same_step(told_in):
    assert left_after(told_in, "cpu") == [4, 4, 4]
    # A host that runs ahead of its device looks at what the device did two steps ago.
    assert left_after(told_in, "cuda") == [6, 6, 6]


def test_nobody_leaves_who_was_not_told():
    assert left_after({}, "cpu") == [0, 0, 0]


def test_a_second_signal_leaves_at_once():
    script = (
        "import os, signal, time; from blt_titan.training.preemption import Preemption\n"
        "with Preemption().heard():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('goes on', flush=True); time.sleep(1.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("goes on\n", 128 + signal.SIGTERM)


def test_handlers_are_given_back():
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    with Preemption().heard():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in preemption.SIGNALS} == before


def command_of(out: Path, small_run: list[str], ranks: int) -> list[str]:
    return [
        *(sys.executable, "-m", "blt_titan", "train", "debug", "--nproc", str(ranks), *small_run),
        *(f"--job.dump_folder={out}", f"--training.steps={STEPS}", "--checkpoint.interval=1000"),
        f"--lr_scheduler.total_steps={STEPS}",
    ]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})


def rank_processes(launcher: int) -> dict[int, int]:
    """Processes of a launcher's ranks, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
        found |= {rank: int(entry.name) for rank in ranks}
    return found


@pytest.mark.slow
def test_ranks_die_with_their_launcher(small_run, tmp_path):
    command = [*command_of(tmp_path, small_run, 2), "--training.steps=100000", "--lr_scheduler.total_steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks = rank_processes(process.pid)
    assert sorted(ranks) == [0, 1]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in ranks.values()):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_rank"),
    [(signal.SIGUSR1, 1), (signal.SIGTERM, None)],
    ids=["USR1 to one rank", "TERM to the launcher"],
)
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_was_not(number, to_rank, small_run, tmp_path):
    straight, told = tmp_path / "straight", tmp_path / "told"
    done = run(command_of(straight, small_run, 2))
    assert done.returncode == 0, done.stderr
    command = command_of(told, small_run, 2)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (told / "metrics.jsonl").exists() or not (told / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid if to_rank is None else rank_processes(process.pid)[to_rank], number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE, out + err
    said = re.search(r"told to leave by [\w' ]+: step (\d+) is saved, in [\d.]+ s; the same command goes on\n", err)
    assert said, out + err
    assert "Traceback" not in out + err
    assert [path.name for path in (told / "checkpoint").glob("step-*")] == [f"step-{said[1]}"]
    assert int(said[1]) < STEPS
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert losses(told) == losses(straight)
    assert list(losses(told)) == list(range(1, STEPS + 1))
