"""The batch script, run by stand-ins for Slurm's commands: what is started, told, and queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from blt_titan.commands import slurm
from blt_titan.commands.run_settings import SHIPPED

ROOT = Path(__file__).parents[2]
# A task on each node; signals go to all of their processes.
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node setsid "$@" &
    pids+=($!)
done
# Slurm signals all that a task has started, or, where it follows tasks by control groups, the tasks alone.
told=("${pids[@]/#/-}")
[[ -z ${TASKS_ALONE:-} ]] || told=("${pids[@]}")
trap 'kill -USR1 -- "${told[@]}"' USR1
trap 'kill -TERM -- "${told[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; code=$?; done
    ((code > worst)) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'host%s\\n' 7 8; else echo "$@" >> "$RECORD/asked"; fi
"""
# Slurm has ended the job already where a file says so.
SQUEUE = """#!/usr/bin/env bash
if [[ -n ${SILENT:-} ]]; then exit 1; fi
if [[ -e $RECORD/ended ]]; then echo COMPLETING; else echo RUNNING; fi
"""
# Leaves with 75 when it is told to, else with the code that is said.
LAUNCHER = """#!/usr/bin/env python3
import os, signal, sys, time
def leave(number, frame):
    os._exit(75)
if "DEAF" not in os.environ:
    signal.signal(signal.SIGUSR1, leave)
    signal.signal(signal.SIGTERM, leave)
open(os.path.join(os.environ["RECORD"], "pid-" + os.environ["SLURM_NODEID"]), "w").write(str(os.getpid()))
open(os.path.join(os.environ["RECORD"], "launcher-" + os.environ["SLURM_NODEID"]), "w").write(" ".join(sys.argv[1:]))
time.sleep(float(os.environ["SECONDS_OF_WORK"]))
sys.exit(int(os.environ["ENDS_WITH"]))
"""


def start(
    folder: Path, script: str, *, seconds: float, code: int = 0, nodes: int = 2, **variables: str
) -> subprocess.Popen:
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("blt-titan", LAUNCHER)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    (folder / "job").write_text(script)
    (folder / "outputs/blt_8b/slurm").mkdir(parents=True)
    environment = os.environ | {
        **{"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(folder), "ENDS_WITH": str(code)},
        **{"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "host[7-8]", "SLURM_NNODES": str(nodes)},
        "SECONDS_OF_WORK": str(seconds),
        **variables,
    }
    return subprocess.Popen(
        ["bash", str(folder / "job")],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def written(capsys, *arguments: str) -> str:
    assert slurm.main(list(arguments)) == 0
    said = capsys.readouterr()
    assert f"#   {said.err.partition('makes no folders: ')[2]}" in said.out
    return said.out


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("alone", ["", "yes"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_leave_is_queued_again(number, alone, capsys, tmp_path):
    script = written(capsys, "blt_8b", "--nodes", "2", "--optimizer.lr=1e-4")
    process = start(tmp_path, script, seconds=60, TASKS_ALONE=alone)
    for node in range(2):
        wait_for(tmp_path / f"launcher-{node}")
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert (tmp_path / "asked").read_text() == "requeue 41234\n"
    assert not list(tmp_path.glob("outputs/blt_8b/slurm/*.left"))
    for node in range(2):
        assert (tmp_path / f"launcher-{node}").read_text() == (
            f"train blt_8b --optimizer.lr=1e-4 --nproc 8 --nnodes 2 --node-rank {node} --master-addr host7 "
            f"--master-port {20000 + 41234 % 20000} --max-restarts 3"
        )


def test_what_slurm_has_ended_itself_is_not_queued_again(capsys, tmp_path):
    """As it does for scancel: the launchers are told by Slurm, and the script must not bring the job back."""
    process = start(tmp_path, written(capsys, "blt_8b", "--nodes", "2"), seconds=60)
    for node in range(2):
        wait_for(tmp_path / f"launcher-{node}")
    (tmp_path / "ended").touch()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    # Slurm tells the tasks of a job that it ends; the script does not tell them once more.
    assert process.poll() is None
    for node in range(2):
        os.kill(int((tmp_path / f"pid-{node}").read_text()), signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert "was ended by Slurm; what was made is saved" in out
    assert not (tmp_path / "asked").exists()


def test_a_controller_that_does_not_answer_is_asked_to_queue_the_job_again(capsys, tmp_path):
    script = written(capsys, "blt_8b", "--nodes", "2").replace("sleep 10", "sleep 0.01")
    process = start(tmp_path, script, seconds=60, SILENT="yes")
    for node in range(2):
        wait_for(tmp_path / f"launcher-{node}")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert (tmp_path / "asked").read_text() == "requeue 41234\n", out


def test_launchers_that_were_told_while_they_began_are_queued_again(capsys, tmp_path):
    process = start(tmp_path, written(capsys, "blt_8b", "--nodes", "2"), seconds=60, DEAF="1")
    for node in range(2):
        wait_for(tmp_path / f"launcher-{node}")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert (tmp_path / "asked").read_text() == "requeue 41234\n", out


def test_a_job_of_an_array_queues_itself_alone(capsys, tmp_path):
    """The last job of an array has the array's number, which means all of them."""
    script = written(capsys, "blt_8b", "--nodes", "1", "--array", "0-3")
    process = start(tmp_path, script, seconds=60, nodes=1, SLURM_ARRAY_JOB_ID="41234", SLURM_ARRAY_TASK_ID="3")
    wait_for(tmp_path / "launcher-0")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert (tmp_path / "asked").read_text() == "requeue 41234_3\n", out


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_what_ends_by_itself_is_not_queued_again(code, capsys, tmp_path):
    process = start(tmp_path, written(capsys, "blt_8b", "--nodes", "2"), seconds=0, code=code)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code, out
    assert not (tmp_path / "asked").exists()


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_options_of_sbatch(capsys):
    script = written(
        capsys, "debug", "--nodes", "3", "--gpus-per-node", "4", "--leave-before", "300", "--sbatch", "partition=gpu",
        "--sbatch", "job-name=mine",
    )  # fmt: skip
    assert directives(script) == [
        *("nodes=3", "ntasks-per-node=1", "gpus-per-node=4", "requeue", "signal=B:USR1@300"),
        *("output=outputs/debug/slurm/%j.log", "open-mode=append", "partition=gpu", "job-name=mine"),
    ]
    assert "--nproc 4 " in script


def test_jobs_of_an_array_differ_by_their_number(capsys):
    script = written(
        capsys, "debug", "--nodes", "1", "--array", "0-3", "--debug.seed=$SLURM_ARRAY_TASK_ID",
        "--job.dump_folder=out/$SLURM_ARRAY_TASK_ID", "--job.description=two words",
    )  # fmt: skip
    assert {"array=0-3", "output=out/%a/slurm/%A_%a.log"} <= set(directives(script))
    words = subprocess.run(
        ["bash", "-c", f"printf '%s|' {script.split('launcher ')[-1].split(' &')[0]}"],
        env={"SLURM_ARRAY_TASK_ID": "3", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    ).stdout
    assert '#   for SLURM_ARRAY_TASK_ID in {0..3}; do mkdir -p out/"$SLURM_ARRAY_TASK_ID"/slurm; done\n' in script
    assert words == ("blt-titan|train|debug|--debug.seed=3|--job.dump_folder=out/3|--job.description=two words|")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["debug"], "--nodes"),
        (["debug", "--nodes", "0"], "--nodes 0"),
        (["debug", "--nodes", "2", "--array", "x"], "--array"),
        (["debug", "--nodes", "2", "--sbatch", "partition"], "OPTION=VALUE"),
        (["debug", "--nodes", "2", "--sbatch", "comment=a\nb"], "OPTION=VALUE"),
        (["debug", "--nodes", "2", "--debug.seed=$SLURM_ARRAY_TASK_ID"], "--array"),
        (["debug", "--nodes", "2", "--training.step=4"], "training.step"),
    ],
)
def test_what_is_asked_wrongly(arguments, said, capsys):
    assert slurm.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_line_end_in_a_name_writes_no_line_of_its_own(capsys, tmp_path):
    config = tmp_path / "a\necho b #.toml"
    config.write_bytes((SHIPPED / "debug.toml").read_bytes())
    for words, what in ((["debug", "--job.dump_folder=a\necho b #"], "job.dump_folder"), ([str(config)], "CONFIG")):
        assert slurm.main([*words, "--nodes", "1"]) == 2
        said = capsys.readouterr()
        assert not said.out
        assert said.err.startswith(f"blt-titan slurm: error: {what} = ")
        assert "has a line end" in said.err


def test_the_script_in_the_checkout_is_what_is_written(capsys):
    assert (ROOT / "scripts/slurm/train.sbatch").read_text() == written(capsys, "blt_8b", "--nodes", "8")
