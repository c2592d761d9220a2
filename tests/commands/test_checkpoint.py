"""`blt-titan checkpoint`: what it lists, finds, removes and sets aside, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan.checkpoint.steps import set_aside, step_folders
from blt_titan.checkpoint.storage_writer import DigestWriter
from blt_titan.commands import checkpoint
from blt_titan.training.run_folder import CONFIG_NAME, LOCK_NAME, RunLock
from tests.helpers.bits import flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run with steps 2, 4 and 6, a half-written step 8, and step 5 set aside."""
    folder = tmp_path / "run" / "checkpoint"
    for name in ("step-2", "step-4", "step-6", "abandoned-20260101-000000/step-5"):
        save({"weight": torch.ones(500)}, storage_writer=DigestWriter(folder / name), no_dist=True)
    (folder / "step-8").mkdir()
    (folder / "step-8" / "__0_0.distcp").write_bytes(b"torn")
    (tmp_path / "run" / LOCK_NAME).touch()
    return tmp_path / "run"


def data_of(run: Path, step: int) -> Path:
    return run / "checkpoint" / f"step-{step}" / "__0_0.distcp"


def call(*words: object) -> int:
    return checkpoint.main([*map(str, words)])


def steps(run: Path) -> list[int]:
    return list(step_folders(run / "checkpoint"))


@pytest.mark.parametrize("below", ["", "checkpoint"])
def test_list_says_what_is_there(run, below, capsys):
    assert call("list", run / below, "--json") == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(c["step"], c["complete"], c["digests"], c["set_aside"]) for c in listed] == [
        (2, True, True, False),
        (4, True, True, False),
        (6, True, True, False),
        (8, False, False, False),
        (5, True, True, True),
    ]
    for one in listed:
        assert one["damage"] is None
        assert one["bytes"] == sum(file.stat().st_size for file in Path(one["path"]).iterdir())
    data_of(run, 4).write_bytes(b"")
    assert call("list", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "2", "4", "6", "8", "5"]
    for line, state in zip(
        lines[1:], ["looks sound", "damaged: ", "looks sound", "half written", "set aside in "], strict=True
    ):
        assert state in line


@pytest.mark.parametrize("damage", ["", "[", "checkpoint = 1", "x = " + "[" * 5000, "[checkpoint]\nfolder = 1"])
def test_settings_that_cannot_be_read_leave_the_usual_folder(run, damage, capsys):
    (run / CONFIG_NAME).write_text(damage)
    assert call("list", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(run / "checkpoint")


def test_verify_names_each_damaged_file(run, capsys):
    assert call("verify", run, "--no-progress") == 0
    assert capsys.readouterr().out.count(": sound\n") == 3
    with flip(data_of(run, 2), 700), flip(data_of(run, 6).with_name(".metadata"), 100):
        assert call("verify", run, "--no-progress") == 1
        out, said = capsys.readouterr()
        assert out == f"{run}/checkpoint/step-4: sound\n"
        assert [line.split(": ")[1] for line in said.splitlines()] == [
            str(data_of(run, 2)),
            str(data_of(run, 6).with_name(".metadata")),
        ]
        assert call("verify", run, "--step", 4) == 0
        assert call("verify", run, "--step", 2, "--json", "--no-progress") == 1
        [one] = json.loads(capsys.readouterr().out.partition("\n")[2])["checkpoints"]
        assert len(one["damaged"]) == 1
    assert call("verify", run / "checkpoint" / "step-2", "--no-progress") == 0
    assert call("verify", run / "checkpoint" / "abandoned-20260101-000000", "--no-progress") == 0


def test_verify_says_what_has_no_digests(run, capsys):
    save({"weight": torch.ones(500)}, checkpoint_id=str(run / "checkpoint" / "step-9"), no_dist=True)
    assert call("verify", run, "--step", 9, "--no-progress") == 0
    assert "step-9: looks sound; it was written without digests" in capsys.readouterr().out


def test_prune_keeps_the_newest_sound_ones(run, capsys):
    before = sorted(run.rglob("*"))
    assert call("prune", run, "--keep", 1, "--abandoned", "--half-written", "--dry-run", "--no-progress") == 0
    assert capsys.readouterr().out.count("would remove ") == 4
    assert sorted(run.rglob("*")) == before
    with flip(data_of(run, 6), 700):  # found in full alone
        assert call("prune", run, "--keep", 1, "--no-progress") == 0
        assert steps(run) == [4, 6, 8]
        out, said = capsys.readouterr()
        assert "not counted: " in said
        assert "step-2 (" in out
        assert call("prune", run, "--keep", 1, "--no-verify") == 0
        assert steps(run) == [6, 8]
    assert call("prune", run, "--half-written", "--abandoned") == 0
    assert (steps(run), set_aside(run / "checkpoint")) == ([6], [])
    with flip(data_of(run, 6), 700):
        assert call("prune", run, "--keep", 1, "--no-progress") == 0
    assert steps(run) == [6]
    assert "nothing to remove" in capsys.readouterr().out


def test_exports_are_no_checkpoints_to_remove(run, capsys):
    """They are `step-N` too, beside `checkpoint` or, as by hand, in it."""
    for export in (run / "hf" / "step-6", run / "checkpoint" / "step-10"):
        export.mkdir(parents=True)
        (export / "config.json").write_text("{}")
    assert call("prune", run / "hf", "--half-written") == 2
    assert "step-N" in capsys.readouterr().err
    assert call("prune", run, "--half-written") == 0
    assert steps(run) == [2, 4, 6, 10]
    assert call("rollback", run, "--step", 4, "--no-progress") == 0
    assert steps(run) == [2, 4]
    assert len(list(run.rglob("config.json"))) == 2, "set aside, not removed"


def test_rollback_sets_later_steps_aside(run, capsys):
    assert call("rollback", run, "--step", 4, "--dry-run", "--no-progress") == 0
    assert steps(run) == [2, 4, 6, 8]
    with flip(data_of(run, 4), 700):
        assert call("rollback", run, "--step", 4, "--no-progress") == 1
    assert "nothing was changed" in capsys.readouterr().err
    assert steps(run) == [2, 4, 6, 8]
    assert call("rollback", run, "--step", 4, "--no-progress") == 0
    assert steps(run) == [2, 4]
    assert list(step_folders(set_aside(run / "checkpoint")[-1])) == [6]
    assert capsys.readouterr().out.endswith("the next start goes on from step-4\n")


HOLD = """
import sys; from blt_titan.training.run_folder import RunLock
lock = RunLock(sys.argv[1]); print("held", flush=True); sys.stdin.read()
"""


@pytest.mark.slow
def test_a_folder_that_a_run_holds_is_left_alone(run, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for words in (["prune", run, "--keep", 1], ["rollback", run / "checkpoint", "--step", 2]):
        assert call(*words) == 2
        assert "another run writes there" in capsys.readouterr().err
    assert call("list", run) == 0
    holder.communicate()
    assert steps(run) == [2, 4, 6, 8]
    assert call("prune", run, "--keep", 1, "--no-progress") == 0
    RunLock(run).release()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--keep", "1"], "--keep: is for prune, not for list"),
        (["verify", "--abandoned"], "--abandoned: is for prune, not for verify"),
        (["prune"], "prune: name what to remove"),
        (["rollback"], "rollback: needs --step N"),
        (["rollback", "--step", "3"], "has no such complete step; it has 2, 4, 6"),
        (["verify", "--step", "8"], "has no such complete step; it has 2, 4, 6"),
    ],
)
def test_what_makes_no_sense_is_one_line(run, words, said, capsys):
    assert call(words[0], run, *words[1:]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert call("list", run.parent) == 2
