"""A rank that hangs is named by the others, with where it stands, before a collective gives up."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blt_titan.monitor.record import ENDED_NAME, read_end
from tests.helpers.training_runs import losses

LIMIT_S = 6
SPINNING = """
import signal
def spin_for_ever(*_):
    while True:
        pass
signal.signal(signal.SIGVTALRM, spin_for_ever)
"""
HUNG_ALONE = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from blt_titan.monitor.record import RunRecord
from blt_titan.training.hang_watch import HangWatch
from blt_titan.training.heartbeat import Heartbeat
folder = Path(sys.argv[1])
dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)
record = RunRecord()
record.begin(folder, rank=0, world_size=1, steps=9, log_freq=1, checkpoints=folder / "checkpoints")
def on_end(end):
    (folder / "told").write_text(end.reason)
    time.sleep(600)  # as a webhook that does not answer
record.on_end = on_end
heartbeat = Heartbeat()
heartbeat.warm = True
heartbeat.at("data", 7)
watch = HangWatch(heartbeat, limit_s=1, train_timeout_s=60, init_timeout_s=60, folder=folder, record=record)
watch.begin()
time.sleep(600)
"""


def start(out: Path, small_run: list[str], ranks: int, *overrides: str) -> subprocess.Popen:
    (out / "spinning.py").write_text(SPINNING)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "blt_titan", "train", "debug", "--nproc", str(ranks), *small_run),
            *(f"--job.dump_folder={out}", "--training.steps=100000", "--lr_scheduler.total_steps=100000"),
            *("--checkpoint.interval=100000", "--experimental.custom_import=spinning", *overrides),
        ],
        env=os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{out}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found += [int(entry.name)] if parent == pid else []
    return found


def rank_of(launcher: int, rank: int) -> int:
    for pid in children(launcher):
        if f"RANK={rank}".encode() in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no rank {rank}")


def wait_for_steps(out: Path, process: subprocess.Popen, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_hung_says_so_in_its_folder_and_to_whoever_asked_to_be_told(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HUNG_ALONE, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    end = read_end(tmp_path / ENDED_NAME)
    assert end is not None, "it left no word of its end"
    assert (end.reason, end.exit_code, end.rank) == ("failed", 1, 0)
    assert end.sentence.startswith("rank 0: the run hangs: no rank is behind; all wait in step 7, data, for ")
    assert (tmp_path / "told").read_text() == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "how"),
    [
        (signal.SIGSTOP, 0, ", and its process is stopped"),
        (signal.SIGVTALRM, 1, ""),
    ],
    ids=["rank 0 is stopped", "rank 1 loops"],
)
def test_the_rank_that_hangs_is_named_and_not_the_one_that_waits(number, victim, how, small_run, tmp_path):
    limits = [f"--heartbeat.limit_seconds={LIMIT_S}", "--comm.train_timeout_seconds=60"]
    process = start(tmp_path, small_run, 2, *limits)
    wait_for_steps(tmp_path, process, 3)
    os.kill(rank_of(process.pid, victim), number)
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 40, "later than needed"
    assert process.returncode == 1, out
    step = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert re.search(
        rf"blt-titan train: error: rank \d: the run hangs: rank {victim} on \S+ stands in step ({step}|{step + 1}), "
        rf"[\w/]+, for \d+ s{how}(; rank {1 - victim} waits in step \d+, [\w/]+)?\n",
        out,
    ), out
    end = read_end(tmp_path / ENDED_NAME)
    assert end is not None, "it left no word of its end"
    assert f"the run hangs: rank {victim} on " in end.sentence
    [report] = tmp_path.glob("hang-step-*.txt")
    said = report.read_text()
    assert f"rank {1 - victim} on" not in said
    assert f"stack of rank {victim}:" in said
    assert ("in spin_for_ever" in said) == (number == signal.SIGVTALRM)


@pytest.mark.slow
def test_a_run_whose_loader_worker_is_stopped_is_the_same_run(small_run, tmp_path):
    """One rank; a worker is stopped, begun anew, and stopped again."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    losses_of = {}
    workers = ["--training.dataloader.num_workers=2", "--data.wait_seconds=2"]
    for folder in (straight, stopped):
        folder.mkdir()
        process = start(folder, small_run, 1, *workers)
        wait_for_steps(folder, process, 4)
        if folder is straight:
            wait_for_steps(folder, process, 60)
            process.terminate()
            process.communicate(timeout=60)
        else:
            for steps in (4, 60):
                wait_for_steps(folder, process, steps)
                # Workers of before are gone.
                os.kill(max(children(rank_of(process.pid, 0))), signal.SIGSTOP)
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 1, out
            assert "All workers of this rank begin anew" in out
            assert re.search(
                r"train: error: rank 0: loader worker 1 \(process \d+\) has shown no sign of life for 2 s "
                r"\(its process is stopped\); it was [\w, ]+ \S+/train-\d+\.arrow: record batch \d+\. "
                r"Workers were begun anew already, \d+ batches before",
                out,
            ), out
        losses_of[folder] = losses(folder)
    both = losses_of[straight].keys() & losses_of[stopped].keys()
    assert len(both) >= 60
    assert {step: losses_of[straight][step] for step in both} == {step: losses_of[stopped][step] for step in both}
