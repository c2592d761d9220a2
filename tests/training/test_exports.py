"""Hugging Face directories beside a run's checkpoints: removed ones, killed runs, resumed ones."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from blt_titan import BLT
from blt_titan.checkpoint.load import describe_model
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.hf.export import stored_weights
from blt_titan.hf.verify.verify import verify_export
from blt_titan.training import exports as in_training
from blt_titan.training.exports import ExportFailedError, HFExports
from tests.helpers.hf_models import another_model, write_checkpoints

pytest.importorskip("transformers", reason="install the dev extra to compare with transformers")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A BLT and its entropy model as training checkpoints, `blt` and `entropy`."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.slow
def test_a_run_writes_directories_beside_its_checkpoints(small_run, checkpoints, tmp_path):
    settings = ["--export.hf_every=2", "--checkpoint.interval=2", "--training.steps=6", "--checkpoint.keep_latest_k=2"]
    rule = ["--patching.rule=global", "--patching.threshold=2.5", "--patching.source=online", "--data.streams=8"]
    rule += [f"--patching.entropy_checkpoint={checkpoints / 'entropy'}", "--patching.max_patch_bytes=256"]
    rows = ["--data.segment_bytes=512", "--data.segment_patches=512", "--training.seq_len=512"]
    command = ["./run_train.sh", *small_run, *rule, *rows, *settings, f"--job.dump_folder={tmp_path}"]
    environment = os.environ | {"NGPU": "2"}

    def run(code: int, *more: str) -> str:
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    another = another_model()
    write_checkpoint(another, "blt_entropy", another.args, tmp_path / "another")
    assert "is not the entropy model by which" in run(2, f"--export.entropy_checkpoint={tmp_path / 'another'}")
    run(0)
    hf = tmp_path / "hf"
    assert sorted(path.name for path in hf.iterdir()) == ["step-4", "step-6"]
    # As if it had been killed before an export; the same patches go on, others must be asked for.
    shutil.rmtree(hf / "step-4")
    assert "threshold = 2.5, this run has 2.4" in run(2, "--training.steps=8", "--patching.threshold=2.4")
    run(0, "--training.steps=8", "--patching.threshold=2.4", "--patching.allow_change")
    assert sorted(path.name for path in hf.iterdir()) == ["step-4", "step-6", "step-8"]
    thresholds = [BLT.from_pretrained(hf / f"step-{step}").rule.threshold for step in (4, 6, 8)]
    assert thresholds == [2.5, 2.5, 2.4]
    for step in (6, 8):
        blt = stored_weights(tmp_path / "checkpoint" / f"step-{step}")
        verify_export(tmp_path / "hf" / f"step-{step}", blt, stored_weights(checkpoints / "entropy"))

    refused = subprocess.run(
        ["./run_train.sh", *small_run, "--export.hf_every=1", f"--job.dump_folder={tmp_path / 'refused'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert refused.returncode == 2
    assert "transformers cannot cut texts for this model: patching.rule = 'space'" in refused.stderr + refused.stdout


def test_checkpoints_that_a_run_removes_are_exported_all_the_same(checkpoints, tmp_path):
    """Linked when they are complete; one that is removed before that does not hold up the others."""
    folder, out = tmp_path / "checkpoint", tmp_path / "hf"
    description = describe_model(checkpoints / "blt")
    exports = HFExports(
        folder,
        out,
        description=description,
        entropy_checkpoint=str(checkpoints / "entropy"),
        dtype="float32",
        force=False,
    )
    for step in (2, 4, 6):
        exports.add(step)
    for step in (4, 6):
        shutil.copytree(checkpoints / "blt", folder / f"step-{step}")
    exports.poll()
    shutil.rmtree(folder / "step-6")
    with pytest.raises(ExportFailedError, match="step-2 is not complete") as error:
        exports.finish()
    assert "step-4" not in str(error.value)
    assert sorted(path.name for path in out.iterdir()) == ["step-4", "step-6"]
    for step in (4, 6):
        verify_export(
            out / f"step-{step}", stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
        )
        assert f"; from step-{step}\n" in (out / f"step-{step}" / "README.md").read_text()


def test_an_export_holds_up_nobody(checkpoints, tmp_path, monkeypatch):
    """The run goes on while a directory is written, however long that takes."""
    folder, out, go_on = tmp_path / "checkpoint", tmp_path / "hf", tmp_path / "go on"
    start = subprocess.Popen
    wait = f"while [ ! -e '{go_on}' ]; do sleep 0.05; done; exec \"$@\""
    monkeypatch.setattr(
        in_training.subprocess, "Popen", lambda command, **how: start(["bash", "-c", wait, "bash", *command], **how)
    )
    description = describe_model(checkpoints / "blt")
    exports = HFExports(folder, out, description=description, entropy_checkpoint=None, dtype="float32", force=True)
    try:
        for step in (2, 4):
            shutil.copytree(checkpoints / "blt", folder / f"step-{step}")
            exports.add(step)
            exports.poll()  # would not return if it waited
        assert not list(out.glob("step-*/config.json"))
        assert not exports.finish(lambda: True), "a run that is told to leave waits for none"
    finally:
        go_on.touch()
    assert exports.finish()
    assert sorted(path.name for path in out.iterdir()) == ["step-2", "step-4"]


def test_a_resumed_run_exports_what_a_killed_one_did_not_come_to(checkpoints, tmp_path):
    folder, out = tmp_path / "checkpoint", tmp_path / "hf"

    def begin() -> HFExports:
        return HFExports(
            folder,
            out,
            description=describe_model(checkpoints / "blt"),
            entropy_checkpoint=str(checkpoints / "entropy"),
            dtype="float32",
            force=False,
        )

    killed = begin()
    for step in (2, 4, 6, 12):
        shutil.copytree(checkpoints / "blt", folder / f"step-{step}")
        killed.add(step)
    killed.poll()
    killed.stop()
    (out / ".step-2.partial").mkdir()
    (out / ".checkpoints" / "step-5").mkdir()  # the kill came while it was linked
    shutil.rmtree(folder / "step-4")  # the run keeps the latest only
    (out / "step-6").mkdir()
    (out / "step-6" / "config.json").write_text("{}")
    shutil.rmtree(out / ".checkpoints" / "step-6")  # done already
    (out / "step-12").mkdir()  # of the steps that are made again
    for step in (7, 8):
        shutil.copytree(checkpoints / "blt", folder / f"step-{step}")  # complete when the kill came, not linked yet

    resumed = begin()
    resumed.go_on_from(10, lambda step: step % 2 == 0)
    resumed.finish()
    [aside] = out.glob("abandoned-*")
    assert [path.name for path in aside.iterdir()] == ["step-12"]
    assert sorted(path.name for path in out.glob("step-*")) == ["step-2", "step-4", "step-6", "step-8"]
    verify_export(out / "step-4", stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy"))
    assert [path.name for path in (out / "step-6").iterdir()] == ["config.json"]
