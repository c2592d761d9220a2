"""The fuzz sees what it looks for: each kind of finding, made on purpose."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.watch import Case, differences, forbidden_changes, snapshot, what_is_wrong_with_the_outcome
from tests.fuzz.worker import _in_a_child

ROOT = Path(__file__).parents[2]
SENTENCE = "blt-titan generate: error: --top-k 0: must be at least 1\n"


@pytest.mark.parametrize(
    ("exit_code", "stderr", "finding"),
    [
        (2, SENTENCE, ""),
        (2, "usage: generate [-h]\n" + SENTENCE, ""),
        (0, "a warning\n", ""),
        (2, "", "without a sentence"),
        (2, "blt-titan generate: error: x\ny\n", "without a sentence"),
        (2, "blt-titan generate: error: 'int' object has no attribute 'get'\n", "leaks Python"),
        (2, 'blt-titan generate: error: CKPT: cannot be read: File "/a.py", line 3, in load\n', "leaks Python"),
        (2, "blt-titan generate: error: F: malformed ('int' object has no attribute 'get'); write it again\n", ""),
        (3, SENTENCE, "exit code 3"),
        (0, "Traceback (most recent call last):\n  File\nValueError: x\n", "traceback: ValueError"),
    ],
)
def test_outcomes(exit_code, stderr, finding):
    found = what_is_wrong_with_the_outcome(Case("generate", []), exit_code, "", stderr)
    assert (finding in found[0]) if finding else not found


def test_what_should_be_refused_is_a_finding_when_done():
    case = Case("generate", [], refused=["--top-k=0"])
    assert "--top-k=0" in what_is_wrong_with_the_outcome(case, 0, "", "")[0]
    assert not what_is_wrong_with_the_outcome(case, 2, "", SENTENCE)


def test_changes(tmp_path):
    for name in ("in", "out", "cwd", "tmp"):
        (tmp_path / name).mkdir()
    for name in ("in/changed", "in/removed", "out/kept"):
        (tmp_path / name).write_text("before")
    case = Case("generate", [], kept=["out/kept"], left_by_error=["out/partial"])
    before = snapshot(tmp_path)
    for name in ("in/changed", "in/created", "out/new", "out/partial", "out/kept", "tmp/x", "aside"):
        (tmp_path / name).write_text("after")
    (tmp_path / "in/removed").unlink()
    changed = differences(before, snapshot(tmp_path))
    never = ["'aside' created", "'in' touched", "'in/changed' changed", "'in/created' created", "'in/removed' removed"]
    assert forbidden_changes(case, 0, changed) == [*never, "'out/kept' changed"]
    assert forbidden_changes(case, 2, changed) == [*never, "'out/kept' changed", "'out/new' created"]
    case.refused.append("--top-k=0")
    assert "'out/partial' created" in forbidden_changes(case, 2, changed)


GUARDED = """
import os, shutil, subprocess, sys
from pathlib import Path
from tests.fuzz.watch import Guard
inside, outside = Path(sys.argv[1], "inside"), Path(sys.argv[1], "outside")
guard = Guard([str(inside)])
(inside / "a").write_text("x")
os.rename(inside / "a", inside / "b")
(outside / "there").read_text()
os.chdir(inside)
assert not guard.faults, guard.faults
for write in (
    lambda: (outside / "new").write_text("x"), lambda: os.mkdir("../outside/new"), lambda: (outside / "there").unlink(),
    lambda: os.rename("b", outside / "b"), lambda: (inside / "link/new").mkdir(), lambda: shutil.rmtree(outside),
    lambda: os.system("true"),
):
    try:
        write()
        raise AssertionError("not prevented")
    except PermissionError:
        pass
assert len(guard.faults) == 7, guard.faults
"""


def test_writes_elsewhere_are_seen_and_prevented(tmp_path):
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside/there").write_text("x")
    (tmp_path / "inside/link").symlink_to(tmp_path / "outside")
    subprocess.run([sys.executable, "-c", GUARDED, str(tmp_path)], cwd=ROOT, check=True)
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["there"]


def test_a_death_is_a_finding(tmp_path):
    answer = _in_a_child(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path)
    assert answer["faults"] == ["the process dies of SIGKILL"]


def test_a_hang_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.worker.WALL_S", 0.2)
    answer = _in_a_child(signal.pause, tmp_path)
    assert answer["faults"] == ["hangs, and was stopped after 0.2 s"]
