"""The batch script under Slurm itself: what is told to leave or loses a node goes on by itself, as if it had not.

Needs `apt-get install slurm-wlm munge` and root: pytest -m slurm tests/integration/test_slurm_cluster.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blt_titan.commands import slurm
from tests.helpers.slurm_cluster import NEEDED, NODES, SlurmCluster, slurm_cluster
from tests.helpers.training_runs import losses

ROOT = Path(__file__).parents[2]
STEPS = 30
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    if "slurm" not in request.config.option.markexpr:
        pytest.skip("starts Slurm's daemons: ask for it by -m slurm")
    if missing := [program for program in NEEDED if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if os.getuid():
        pytest.skip("Slurm's daemons start jobs of users: needs root")
    with slurm_cluster() as cluster:
        commands = tmp_path_factory.mktemp("bin")
        (commands / "blt-titan").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m blt_titan "$@"\n')
        (commands / "blt-titan").chmod(0o755)
        cluster.environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        yield cluster


def settings(small_run: list[str], folder: Path | str) -> list[str]:
    return [
        *small_run,
        *(f"--job.dump_folder={folder}", f"--training.steps={STEPS}", "--lr_scheduler.total_steps=100000"),
        *("--checkpoint.interval=5", "--checkpoint.keep_latest_k=0"),
    ]


@pytest.fixture(scope="module")
def straight(cluster, small_run, tmp_path_factory) -> dict[int, float]:
    """Losses of a run that nobody disturbed, without Slurm."""
    folder = tmp_path_factory.mktemp("straight")
    command = ["blt-titan", "train", "debug", "--nproc", "2", *settings(small_run, folder)]
    subprocess.run(command, env=cluster.environment, capture_output=True, check=True, timeout=240)
    return losses(folder)


def queue(cluster: SlurmCluster, place: Path, *arguments: str) -> str:
    """Write the script, make its folders as it says, and queue it by one sbatch."""
    script = place / "train.sbatch"
    assert slurm.main(["debug", "--gpus-per-node", "1", "--out", str(script), *arguments]) == 0
    make = next(line for line in script.read_text().splitlines() if "mkdir -p" in line).lstrip("# ")
    subprocess.run(["bash", "-c", make], cwd=place, check=True)
    return cluster.say("sbatch", "--parsable", f"--chdir={place}", str(script))


def has_steps(folder: Path, more_than: int = 0) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and file.read_text().count("loss_nats") > more_than


def test_what_is_told_to_leave_goes_on_by_itself(cluster, straight, small_run, tmp_path):
    run = tmp_path / "run"
    job = queue(cluster, tmp_path, "--nodes", "2", *settings(small_run, run))
    log = run / "slurm" / f"{job}.log"
    # The signal that Slurm sends before the time is up, then what an operator or a more urgent job does.
    told = (["scancel", "--signal=USR1", "--batch", job], ["scontrol", "requeue", job])
    for restarts, command in enumerate(told):
        cluster.wait(lambda done=restarts: has_steps(run, 5 * done), "first steps")
        cluster.say(*command)
        cluster.wait(lambda done=restarts: cluster.job(job)["Restarts"] == str(done + 1), "queued again")
        done_before = len(losses(run))
        assert done_before < STEPS
        cluster.wait(lambda: cluster.job(job)["JobState"] == "RUNNING", "started again")
        cluster.wait(lambda done=done_before: has_steps(run, done), "goes on")
    cluster.wait(lambda: cluster.job(job)["JobState"] == "COMPLETED", "end")
    said = log.read_text()
    assert said.count("is saved, in") >= 2, said
    assert f"told to leave; queueing job {job} again" in said
    assert f"job {job} was ended by Slurm" in said
    assert losses(run) == straight
    assert cluster.job(job)["Restarts"] == "2"


def test_a_lost_node_and_a_cancelled_job(cluster, straight, small_run, tmp_path):
    run = tmp_path / "run"
    job = queue(cluster, tmp_path, "--nodes", "2", *settings(small_run, run), "--training.steps=100000")
    cluster.wait(lambda: list(run.glob("checkpoint/step-5/.metadata")), "first checkpoint")
    cluster.kill_node(NODES[1])
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "queued again")
    done_before = len((run / "metrics.jsonl").read_text().splitlines())
    cluster.start_node(NODES[1])
    cluster.wait(lambda: cluster.job(job)["JobState"] == "RUNNING", "started again")
    cluster.wait(lambda: len(losses(run)) > max(done_before, 15), "goes on")
    cluster.say("scancel", job)
    cluster.wait(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "end")
    # Saved, and it stays cancelled.
    assert cluster.job(job)["JobState"] == "CANCELLED", (run / "slurm" / f"{job}.log").read_text()
    had = losses(run)
    assert list(had) == list(range(1, len(had) + 1))
    common = had.keys() & straight.keys()
    assert {step: had[step] for step in common} == {step: straight[step] for step in common}
    assert f"step-{max(had)}" in {path.name for path in (run / "checkpoint").iterdir()}


def test_a_study_by_an_array(cluster, small_run, tmp_path):
    number = slurm.NUMBER
    array = queue(
        cluster, tmp_path, "--nodes", "1", "--array", "0-1", *settings(small_run, f"study/{number}"),
        f"--debug.seed={number}",
    )  # fmt: skip
    runs = [tmp_path / f"study/{number}" for number in range(2)]
    for run in runs:
        cluster.wait(lambda run=run: has_steps(run), "first steps")
    # The last one has the number of the array: it must not take the other along.
    cluster.say("scancel", "--signal=USR1", "--batch", f"{array}_1")
    cluster.wait(lambda: "queueing job" in (runs[1] / f"slurm/{array}_1.log").read_text(), "told to leave")
    for number in range(2):
        name = f"{array}_{number}"
        cluster.wait(lambda name=name: cluster.job(name)["JobState"] == "COMPLETED", name)
        assert list(losses(runs[number])) == list(range(1, STEPS + 1))
        assert cluster.job(name)["Restarts"] == str(number)
    assert losses(runs[0]) != losses(runs[1])
