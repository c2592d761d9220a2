"""The launchers of several nodes, here processes of one machine: who is missing is named, and all end alike."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blt_titan.commands import launch
from blt_titan.commands.launch import Restarts
from blt_titan.commands.nodes import Nodes, NodesError, joint
from blt_titan.commands.ranks import Outcome, Ranks

ROOT = Path(__file__).parents[2]
# A rank: notes that it began, and does what the file says with `rank` and `start`, its number of starts before.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from blt_titan.data.prepare.worker_pool import die_with_parent
die_with_parent()

def ends(code, kind, sentence):
    get_error_handler().record_exception(type(kind, (RuntimeError,), {})(sentence))
    os._exit(code)

rank, folder = int(os.environ["RANK"]), Path(__file__).parent
notes = folder / f"rank{rank}.jsonl"
start = len(notes.read_text().splitlines()) if notes.exists() else 0
with notes.open("a") as file:
    print(json.dumps(os.environ["MASTER_PORT"]), file=file)
exec((folder / "what").read_text())
"""
LAUNCH = """
import json, os, sys
from blt_titan.commands import launch, nodes, ranks
ranks.RANK_MODULE = "stand_in"
nodes.SILENT_S, nodes.BEAT_S, nodes.LOOK_S, nodes.GRACE_S, nodes.SETTLE_S = 4.0, 0.5, 0.2, 1.0, 6.0
launch.FIRST_WAIT_S = 0.2
said = json.loads(sys.argv[1])
here = ranks.Ranks(1, said["nnodes"], said["node"], "localhost", said["port"])
if "dies" in said:
    nodes.Nodes.settle = lambda *of_its_ranks: os.kill(os.getpid(), 9)
if "says_here" in said:
    pause = nodes.Nodes._pause
    nodes.Nodes._pause = lambda *given: (print("here", flush=True), pause(*given))
if "refuses" in said:
    launch.tell_other_nodes(here, said["refuses"], said["meeting_s"])
    sys.exit(2)
sys.exit(launch.launch("x", here, [], restarts=launch.Restarts(said["most"]), meeting_s=said["meeting_s"]))
"""


class Cluster:
    """Launchers of nodes with a rank each."""

    def __init__(self, folder: Path, what: str, *, nnodes: int = 2, most: int = 0, meeting_s: float = 60):
        self.folder = folder
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "what").write_text(what)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.said = {"nnodes": nnodes, "port": port, "most": most, "meeting_s": meeting_s}
        self.started: list[subprocess.Popen] = []

    def start(self, node: int, **other) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, json.dumps(self.said | {"node": node} | other)],
            env=os.environ | {"PYTHONPATH": f"{self.folder}:{ROOT}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def starts(self, rank: int) -> list[str]:
        notes = self.folder / f"rank{rank}.jsonl"
        return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    def wait_for_start(self, rank: int, number: int) -> None:
        deadline = time.monotonic() + 90
        while len(self.starts(rank)) < number:
            assert time.monotonic() < deadline, [process.poll() for process in self.started]
            time.sleep(0.05)


def end(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=90)
    assert "Traceback" not in out + err
    return process.returncode, err


@pytest.mark.slow
def test_who_is_missing_is_named_within_the_time(tmp_path):
    cluster = Cluster(tmp_path, "", nnodes=3, meeting_s=8)
    first, second = cluster.start(0), cluster.start(1)
    for process in (first, second):
        code, err = end(process)
        assert code == 1
        said = (
            r"x: error: node 2 of 3 did not come within 8 s; here: 0 \(\S+\), 1 \(\S+\)\. Start it there with the same"
        )
        assert re.search(said, err), err
    alone = cluster.start(1, meeting_s=2)
    code, err = end(alone)
    assert code == 1
    port = cluster.said["port"]
    assert f"node 0 does not answer at localhost:{port}, --master-addr and --master-port, within 2 s" in err
    assert not cluster.starts(0)


@pytest.mark.slow
def test_one_that_is_asked_wrongly_ends_all_at_once(tmp_path):
    what = "ends(2, 'RunConfigError', 'optimizer.lr = 7: too much') if rank else time.sleep(60)"
    cluster = Cluster(tmp_path, what, most=5)
    began = time.monotonic()
    for process in [cluster.start(0), cluster.start(1)]:
        code, err = end(process)
        assert (code, "rank 1: optimizer.lr = 7: too much" in err) == (2, True), err
    assert time.monotonic() - began < 50, "the rank of node 0 was waited for"
    assert [len(cluster.starts(rank)) for rank in (0, 1)] == [1, 1], "asked wrongly is not asked again"


@pytest.mark.slow
def test_settings_that_one_node_refuses_end_the_others(tmp_path):
    cluster = Cluster(tmp_path, "")
    first, second = cluster.start(0), cluster.start(1, refuses="training.dataset_path = 'x': no such directory")
    code, err = end(first)
    assert code == 2
    said = rf"x: error: node 1 \({socket.gethostname()}\): training\.dataset_path = 'x': no such directory\n"
    assert re.search(said, err.replace("node 1:", f"node 1 ({socket.gethostname()}):")), err
    assert end(second)[0] == 2


@pytest.mark.slow
def test_a_rank_that_dies_has_all_nodes_start_again_at_another_port(tmp_path):
    what = "if start == 0: os.kill(os.getpid(), 9) if rank else time.sleep(60)"
    cluster = Cluster(tmp_path, what, most=1)
    for process in [cluster.start(0), cluster.start(1)]:
        code, err = end(process)
        assert code == 0, err
        assert re.search(r"x: error: node 1 \(\S+\): ", err), err
        assert "x: starting again in 0.2 s from the beginning, restart 1 of 1" in err
    assert cluster.starts(0) == cluster.starts(1)
    assert len(set(cluster.starts(0))) == 2


@pytest.mark.slow
def test_a_lost_node_is_replaced_and_a_living_one_is_not(tmp_path):
    what = "if start == 0: time.sleep(120)"
    cluster = Cluster(tmp_path, what, most=1)
    first, second = cluster.start(0), cluster.start(1)
    cluster.wait_for_start(1, 1)
    code, err = end(cluster.start(1))
    assert code == 1
    assert re.search(r"--node-rank 1: node 1 \(\S+\) is alive, started by another launcher", err), err
    assert (first.poll(), second.poll()) == (None, None)
    second.send_signal(signal.SIGKILL)
    second.wait()
    third = cluster.start(1)
    code, err = end(first)
    assert code == 0, err
    assert re.search(r"node 1 (\(\S+\) gives no sign of life for 4 s|was lost: another launcher)", err), err
    assert end(third)[0] == 0
    assert [len(cluster.starts(rank)) for rank in (0, 1)] == [2, 2]


@pytest.mark.slow
def test_a_launcher_that_dies_as_its_ranks_are_done_is_named_and_not_waited_for(tmp_path):
    cluster = Cluster(tmp_path, "")
    first, second = cluster.start(0), cluster.start(1, dies=True)
    assert second.wait(60) == -signal.SIGKILL
    began = time.monotonic()
    code, err = end(first)
    assert code == 1
    assert re.search(r"x: error: node 1 \(\S+\) gives no sign of life for 4 s", err), err
    assert time.monotonic() - began < 45


@pytest.mark.slow
def test_a_node_0_that_is_stopped_is_named_by_the_others(tmp_path):
    # What each rank does until the file is there that ends it.
    what = "while rank and not Path(folder / 'done').exists(): time.sleep(0.1)"
    cluster = Cluster(tmp_path, what)
    first, second = cluster.start(0), cluster.start(1)
    try:
        cluster.wait_for_start(1, 1)
        first.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code, err = end(second)
        assert code == 1
        said = r"x: error: node 0 \(localhost:\d+\) gives no answer for 4 s: its machine is gone or its launcher is st"
        assert re.search(said, err), err
        assert time.monotonic() - began < 45
    finally:
        first.kill()


HOLDER = """
import time
from torch.distributed import TCPStore
store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(300)
"""


@pytest.fixture
def holder():
    """A process that holds a store, and its port."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


# Prints what `settle` and `close` of node 1 raise and take, once a line on stdin says that node 0 is stopped.
SETTLES = """
import os, signal, sys, threading, time
from blt_titan.commands import nodes, ranks
nodes.SILENT_S, nodes.BEAT_S, nodes.LOOK_S = 3.0, float(sys.argv[2]), 0.1
here = nodes.Nodes(ranks.Ranks(1, 2, 1, "localhost", int(sys.argv[1])), 30, lambda: None)
signal.signal(signal.SIGTERM, lambda *_: print("signal heard", flush=True))
time.sleep(0.5)
print("connected", flush=True)
sys.stdin.readline()
threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
began = time.monotonic()
try:
    here.settle(ranks.Outcome(0), None)
except nodes.NodesError as error:
    print(error, flush=True)
here.close()
print(time.monotonic() - began, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("beat_s", [0.3, 1000], ids=["the watcher asks too", "the watcher asks nothing"])
def test_settle_and_close_end_and_signals_are_heard_while_node_0_is_stopped(holder, beat_s):
    process, port = holder
    launcher = subprocess.Popen(
        [sys.executable, "-c", SETTLES, str(port), str(beat_s)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    try:
        assert launcher.stdout.readline() == "connected\n"
        process.send_signal(signal.SIGSTOP)
        out, _ = launcher.communicate("stopped\n", timeout=60)
    finally:
        launcher.kill()
    heard, said, seconds = out.splitlines()
    assert heard == "signal heard"
    assert re.fullmatch(rf"node 0 \(localhost:{port}\) gives no answer for 3 s: its machine is gone or .*", said)
    assert float(seconds) < 15


@pytest.mark.slow
def test_a_stopped_node_0_does_not_hold_up_one_that_comes(holder):
    process, port = holder
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(NodesError, match=rf"node 0 does not answer at localhost:{port}, .* within 2 s"):
        Nodes(Ranks(1, 2, 1, "localhost", port), 2, lambda: None)
    assert time.monotonic() - began < 15


@pytest.mark.slow
def test_a_run_that_was_told_to_leave_is_not_started_again(tmp_path):
    cluster = Cluster(tmp_path, "ends(75, 'PreemptedError', 'told to leave')", most=3)
    for process in [cluster.start(0), cluster.start(1)]:
        code, err = end(process)
        assert (code, "x: told to leave" in err) == (75, True), err
    assert [len(cluster.starts(rank)) for rank in (0, 1)] == [1, 1]


@pytest.mark.slow
def test_a_launcher_told_to_leave_before_its_ranks_run_has_the_others_leave(tmp_path):
    cluster = Cluster(tmp_path, "", nnodes=3, meeting_s=80)
    first, second = cluster.start(0), cluster.start(1, says_here=True)
    assert second.stdout is not None
    assert second.stdout.readline() == "here\n"
    began = time.monotonic()
    second.send_signal(signal.SIGTERM)
    code, err = end(second)
    assert (code, "x: told to leave by SIGTERM; no rank was running" in err) == (75, True), err
    code, err = end(first)
    assert code == 75
    assert re.search(r"x: node 1 \(\S+\) was told to leave by SIGTERM\n", err), err
    assert time.monotonic() - began < 45, "the one that is missing was waited for"
    assert not cluster.starts(0)


@pytest.mark.slow
def test_restarts_without_a_checkpoint_end(tmp_path):
    cluster = Cluster(tmp_path, "os._exit(1)", nnodes=1, most=2)
    code, err = end(cluster.start(0))
    assert code == 1
    assert re.findall(r"x: (starting again in \S+ s|3 failures without.*)", err) == [
        "starting again in 0.2 s",
        "starting again in 0.4 s",
        "3 failures without a new checkpoint: not started again",
    ]
    assert len(cluster.starts(0)) == 3


def test_a_new_checkpoint_begins_the_count_anew_and_waits_are_bounded(tmp_path):
    judge = launch._Judge(Restarts(2, tmp_path))
    dead = Outcome(137, "died")
    assert [judge(dead).again_after_s for _ in range(3)] == [5, 10, None]
    judge = launch._Judge(Restarts(100, tmp_path))
    waits = [judge(dead).again_after_s for _ in range(9)]
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7/.metadata").touch()
    assert judge(dead).said == "starting again in 5 s from step 7, restart 1 of 100"
    for code in (0, 2, 3, 75):
        assert judge(Outcome(code)).again_after_s is None
    assert judge(replace(dead, was_told=True)).again_after_s is None


def test_a_rollback_to_an_earlier_step_is_no_progress(tmp_path):
    for step in (7, 9):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}/.metadata").touch()
    judge, dead = launch._Judge(Restarts(2, tmp_path)), Outcome(1, "died")
    assert judge(dead).again_after_s == 5
    (tmp_path / "step-9/.metadata").unlink()
    assert [judge(dead).again_after_s for _ in range(2)] == [10, None]


@pytest.mark.parametrize(("code", "ends_with"), [(0, 0), (3, 3), (1, 75)])
def test_a_signal_after_the_ranks_have_ended_does_not_change_what_came_of_them(code, ends_with, monkeypatch, capsys):
    """Where there is to be another attempt, the signal is heeded instead."""
    begun = []

    def run_ranks(*args, **options):
        begun.append(1)
        return Outcome(code, "as it came out")

    def say(name, verdict):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    monkeypatch.setattr(launch, "_say", say)
    monkeypatch.setattr(launch, "_set_environment", lambda ranks: None)
    assert launch.launch("x", Ranks(1), [], restarts=Restarts(3)) == ends_with
    assert len(begun) == 1
    assert ("told to leave by SIGTERM" in capsys.readouterr().err) is (ends_with == 75)


def test_how_a_job_ended():
    done, refused, left, dead = Outcome(0), Outcome(2, "wrong"), Outcome(75, "left"), Outcome(137, "died")
    assert joint({0: done, 1: done}, None) == done
    assert joint({0: done, 1: left}, None) == left
    assert joint({0: dead, 1: left}, (0, dead)) == left
    assert joint({0: dead, 1: refused}, (0, dead)) == refused
    assert joint({0: Outcome(1, "its peer is gone")}, (1, dead)) == dead
    assert joint({0: dead, 1: done}, None) == dead
    told_and_killed = Outcome(143, "ended by SIGTERM", was_told=True)
    found = joint({0: dead, 1: told_and_killed}, (0, dead))
    assert (found.code, found.is_worth_a_restart) == (137, False), "who was told to leave is not to be called back"
