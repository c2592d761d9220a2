"""How a run stands by what lies in its folder: running, done, preempted, refused, failed, killed; also elsewhere."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blt_titan.commands import status as command
from blt_titan.monitor.record import End, RunRecord, read_end
from blt_titan.monitor.status import SILENT_S, StatusError, is_locked, read_status, status_lines

HOLD = """
import sys, time
from blt_titan.training.run_folder import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A folder whose lock a process holds."""
    folder = tmp_path_factory.mktemp("held")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield folder
    holder.kill()
    holder.wait()


def begin(folder: Path, rank: int = 0) -> RunRecord:
    (folder / "checkpoint/step-4").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint/step-4/.metadata").touch()
    (folder / "checkpoint/step-6").mkdir(exist_ok=True)  # half written
    record = RunRecord()
    record.begin(folder, rank=rank, world_size=2, steps=20, log_freq=2, checkpoints=folder / "checkpoint")
    return record


def trained(folder: Path) -> RunRecord:
    record = begin(folder)
    record.loaded(2)
    for step in (4, 6):
        record.made(step)
        record.line(step, bytes_per_second=1000.0, bits_per_byte=2.5)
        time.sleep(0.01)
    record.held_out(6, 2.75)
    record.warning(6, "rank 1 on b is slow")
    return record


def change(folder: Path, **changes) -> None:
    """Change fields of the record's start, and push all its times back by `ago` seconds."""
    record = json.loads((folder / "status.json").read_text())
    ago = changes.pop("ago", 0.0)
    record["start"] |= changes
    for part in ("start", "first", "last", "held_out", "warning"):
        record[part]["time"] -= ago
    (folder / "status.json").write_text(json.dumps(record))


def test_a_running_run(held):
    trained(held)
    status = read_status(held)
    assert (status.state, status.why, status.exit_code) == ("running", "", None)
    assert (status.step, status.steps, status.world_size, status.pid) == (6, 20, 2, os.getpid())
    assert status.checkpoint_step == 4, "a half-written one is none"
    assert status.steps_per_second is not None
    assert status.seconds_left == pytest.approx(14 / status.steps_per_second)
    said = list(status_lines(status))
    assert said[0].startswith(f"{held}: running, since ")
    assert any(line.startswith("  step 6 of 20, ") for line in said)
    assert "  last held-out: 2.7500 bits/byte, step 6" in said
    assert said[-1] == "  last warning, 0 s ago: step 6: rank 1 on b is slow"


def test_a_run_that_is_silent_and_one_that_starts(held):
    trained(held)
    change(held, ago=SILENT_S + 1)
    status = read_status(held)
    assert status.state == "running"
    assert status.why.startswith("nothing was written for 1 min 1 s: ")
    begin(held)
    status = read_status(held)
    assert (status.state, status.step, status.seconds_left) == ("running", 0, None)
    # What an earlier start said holds once its steps are loaded; of a run that begins anew nothing.
    assert (status.held_out, status.warning) == (None, None)


def test_a_line_is_as_old_as_it_is_whatever_came_after_it(held):
    record = trained(held)
    change(held, ago=3.0)
    before = json.loads((held / "status.json").read_text())["last"]["time"]
    record._status["last"]["time"] = before
    record.held_out(6, 2.5)
    status = read_status(held)
    assert status.line_logged == before
    assert "  last line: 2.5000 bits/byte, 3 s ago" in status_lines(status, now=before + 3.0)
    assert read_status(held).heard > before + 2.0
    begin(held)
    assert read_status(held).line_logged is None


def test_what_an_earlier_start_said_holds_as_far_as_its_steps_are_kept(tmp_path):
    trained(tmp_path)
    again = begin(tmp_path)
    again.loaded(6)
    status = read_status(tmp_path)
    assert status.step == 6
    assert status.held_out is not None
    assert status.warning is not None
    begin(tmp_path).loaded(4)
    assert read_status(tmp_path).held_out is None


def test_a_killed_run_here_and_elsewhere(tmp_path):
    trained(tmp_path)
    status = read_status(tmp_path)
    assert status.state == "killed", "its lock is free, and it said nothing"
    assert status.why == f"it left no word of its end; {socket.gethostname()} last wrote 0 s ago"
    assert status.seconds_left is None
    change(tmp_path, host="elsewhere")
    status = read_status(tmp_path)
    assert (status.state, status.why) == ("running", "its lock is not seen from here, but elsewhere wrote 0 s ago")
    change(tmp_path, ago=SILENT_S + 1)
    assert read_status(tmp_path).state == "killed"


@pytest.mark.parametrize(("reason", "code"), [("done", 0), ("preempted", 75), ("refused", 2), ("failed", 1)])
def test_a_run_that_ended_says_why(reason, code, tmp_path, capsys):
    trained(tmp_path).end(reason, code, "told so,\n  in two lines")
    status = read_status(tmp_path)
    assert (status.state, status.exit_code, status.why) == (reason, code, "told so, in two lines")
    assert command.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path}: {reason}, exit code {code}, 0 s ago, 2 ranks, process ")
    assert said[1] == "  told so, in two lines"
    assert command.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == status.to_json()


def test_a_run_that_goes_on_forgets_its_end(held):
    trained(held).end("preempted", 75, "told to leave")
    trained(held)
    assert read_status(held).state == "running"
    assert read_end(held / "ended.json") is None


def test_the_first_rank_that_fails_is_the_cause(tmp_path):
    first, other = begin(tmp_path), begin(tmp_path, rank=1)
    told: list[End] = []
    first.on_end = told.append
    other.made(7)
    other.end("failed", 1, "shard 3 is damaged")
    first.end("failed", 1, "RuntimeError: Connection closed by peer")
    status = read_status(tmp_path)
    assert (status.why, status.step) == ("shard 3 is damaged", 7)
    assert [(end.rank, end.sentence) for end in told] == [(1, "shard 3 is damaged")]
    RunRecord().end("failed", 1, "a run that has no folder leaves no word")


def test_a_lock_is_asked_for_and_not_taken(held, tmp_path):
    assert is_locked(held / "run.lock") is True
    assert is_locked(tmp_path / "run.lock") is False
    (tmp_path / "run.lock").touch()
    assert is_locked(tmp_path / "run.lock") is False


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 9}', '{"version": 1, "start": 3}', "[" * 9999])
def test_a_record_that_is_damaged_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "status.json").write_text(content)
    assert command.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"blt-titan status: error: {tmp_path}/status.json: is damaged (")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("start", "time", 1e300),
        ("start", "steps", "many"),
        ("start", "checkpoints", 3),
        ("start", "log_freq", None),
        ("first", "time", float("nan")),
        ("last", "bits_per_byte", "x"),
        ("last", "bytes_per_second", [1]),
        ("last", "step", float("inf")),
        ("held_out", "bits_per_byte", None),
        ("warning", "time", -1),
    ],
)
def test_a_value_that_is_damaged_is_one_sentence(part, key, value, tmp_path, capsys):
    trained(tmp_path)
    record = json.loads((tmp_path / "status.json").read_text())
    record[part][key] = value
    (tmp_path / "status.json").write_text(json.dumps(record))
    assert command.main([str(tmp_path)]) == 2
    assert "status.json: is damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", '{"reason": "bored"}', "\0" * 50])
def test_an_end_that_is_cut_off_is_none(content, tmp_path):
    trained(tmp_path)
    (tmp_path / "ended.json").write_text(content)
    assert read_status(tmp_path).state == "killed"


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(StatusError, match=r"has no status\.json; no run was started there"):
        read_status(tmp_path)


def test_status_needs_no_torch():
    program = "import sys, blt_titan.commands.status; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
