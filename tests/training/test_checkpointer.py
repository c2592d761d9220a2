"""Saves that cannot be made, and what is left: a sentence, whole earlier checkpoints, and a run that goes on."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.steps import complete_steps, set_aside, step_folders
from blt_titan.checkpoint.verify import faults
from blt_titan.titan import CheckpointManager
from blt_titan.training.checkpointer import RunCheckpoints
from blt_titan.training.failures import NonFiniteLossError
from blt_titan.training.finite import are_finite, not_finite
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, make_trainer, train

INTERVAL, STEPS = 4, 12
SAVES = [
    *(f"--checkpoint.interval={INTERVAL}", f"--training.steps={STEPS}", "--checkpoint.keep_latest_k=2"),
    f"--lr_scheduler.total_steps={STEPS}",
]
ASYNC = "--checkpoint.async_mode=async"


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@pytest.fixture
def mounts(tmp_path):
    """The folder of file systems that a test makes."""
    probe = tmp_path / "probe"
    probe.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(probe))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs: run it as root of a machine or a container that may")
    subprocess.run(["umount", str(probe)], check=True)
    yield tmp_path
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        if (place := line.split()[1]).startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "-l", place], check=False)


def used_mib(folder: Path) -> float:
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize / 2**20


class Place:
    """The file system of a run's checkpoints, and what can happen to it; rank 0 has it happen."""

    def __init__(self, out: Path):
        self.folder = out / "checkpoint"
        self.elsewhere = out / "elsewhere"
        if dist.get_rank() == 0:
            self.elsewhere.mkdir(parents=True)
            self.folder.mkdir()
            mount("-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.elsewhere))
            mount("--bind", str(self.elsewhere), str(self.folder))
        dist.barrier()

    def fill(self) -> None:
        # Half a checkpoint more: it fails amid the files of the next.
        size = used_mib(self.elsewhere) * 1.5
        mount("-o", f"remount,size={int(size * 1024)}k", str(self.elsewhere))

    def make_read_only(self) -> None:
        mount("-o", "remount,ro,bind", str(self.folder))

    def take_away(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    def mend(self) -> None:
        if dist.get_rank() == 0:
            mount("-o", "remount,size=256m", str(self.elsewhere))
            if os.path.ismount(self.folder):
                mount("-o", "remount,rw,bind", str(self.folder))
            else:
                assert not list(self.folder.iterdir()), "it was written to what lies under the mount"
                mount("--bind", str(self.elsewhere), str(self.folder))
        dist.barrier()


def train_until_it_fails(out: Path, overrides: list[str], at: int, happen: Callable[[], Any]) -> tuple[str, int]:
    """Train, with something that happens before step `at`; return what was said, and the step after which it was."""
    trainer = make_trainer(str(out), *overrides)
    step = trainer.train_step

    def train_step(data_iterator: Any) -> None:
        if trainer.step == at:
            trainer.checkpointer._async_wait()  # the save before is complete
            if dist.get_rank() == 0:
                happen()
            dist.barrier()
        step(data_iterator)

    trainer.train_step = train_step
    try:
        trainer.train()
    except (CheckpointError, NonFiniteLossError) as error:
        return str(error), trainer.step
    finally:
        trainer.close()
    raise AssertionError("nothing was said")


def fail_and_go_on(out: str, overrides: list[str], happenings: list[str]) -> dict[str, Any]:
    """Let each thing happen between the saves of steps 4 and 8, then mend it and go on."""
    found: dict[str, Any] = {}
    straight = train(f"{out}/straight", *overrides)
    for mode, options in (("sync", []), ("async", [ASYNC])):
        for what in happenings:
            run = Path(out) / f"{mode}-{what}"
            place = Place(run)
            said, step = train_until_it_fails(run, [*overrides, *options], INTERVAL + 2, getattr(place, what))
            if what == "take_away":
                place.mend()
            dist.barrier()
            left = {
                step: list(faults(path, reads=lambda name: True)) for step, path in complete_steps(place.folder).items()
            }
            dist.barrier()
            if what != "take_away":
                place.mend()
            again = train(str(run), *overrides, *options)
            same = all(torch.equal(parameter, again[name]) for name, parameter in straight.items())
            complete = list(complete_steps(place.folder))
            found[f"{mode} {what}"] = (said.replace(f"{run}/checkpoint", "FOLDER"), step, left, same, complete)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "happenings"), [(1, ["fill", "make_read_only", "take_away"]), (2, ["fill"])])
def test_a_save_that_fails_is_a_sentence_and_the_run_goes_on(ranks, happenings, small_run, mounts):
    options = [*small_run, *SAVES, f"--parallelism.data_parallel_shard_degree={ranks}"]
    all_found = run_distributed(fail_and_go_on, ranks, str(mounts), options, happenings, timeout_s=400)
    not_written = r"FOLDER/step-8: a checkpoint could not be written "
    wanted = {
        "fill": not_written
        + r"\(No space left on device; [\d.]+ of [\d.]+ GB are free there\); step-4 was saved before: "
        r"make room there, "
        "or see that it can be written, and start again",
        "make_read_only": not_written + r"\(Read-only file system; .*; step-4 was saved before: .*",
        "take_away": r"FOLDER: step 8 is not saved, because the folder is not what it was "
        r"\(FOLDER/step-4/\.metadata is gone\): see that its file system is mounted, and start again",
    }
    for found in all_found:
        assert len(found) == 2 * len(happenings)
        for name, (said, step, left, same, complete) in found.items():
            mode, what = name.split()
            assert re.fullmatch(wanted[what], said), (name, said)
            # At once: not when the next save is due, at step 12.
            assert step == 8 if mode == "sync" or what == "take_away" else 8 <= step < STEPS, (name, step)
            assert left == {INTERVAL: []}, name
            assert same, name
            assert complete == [8, 12], name
    for run in mounts.glob("*sync-*"):
        assert losses(run) == losses(mounts / "straight"), run


def spoil_weights(out: str, overrides: list[str]) -> tuple[str, int]:
    """Make a weight of the last rank infinite in step 8, by the update itself: loss and gradient of it are finite."""
    trainer = make_trainer(out, *overrides)
    update = trainer.optimizers.step

    def step(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        if trainer.step == 8 and dist.get_rank() == dist.get_world_size() - 1:
            parameter = next(p for p in trainer.model_parts[0].parameters() if local(p).numel())
            with torch.no_grad():
                local(parameter).view(-1)[-1] = torch.inf

    trainer.optimizers.step = step
    try:
        trainer.train()
    except NonFiniteLossError as error:
        return str(error), trainer.step
    finally:
        trainer.close()
    raise AssertionError("nothing was said")


def local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def what_is_left(out: str, overrides: list[str]) -> dict[str, Any]:
    """Run to the end in both ways of saving; then spoil weights, and flip bits of the newest checkpoint."""
    found: dict[str, Any] = {}
    for mode, options in (("sync", []), ("async", [ASYNC])):
        run = Path(out) / mode
        if dist.get_rank() == 0:
            for name in ("abandoned-20200101-000000", "abandoned-20200102-000000"):
                (run / "checkpoint" / name / "step-3").mkdir(parents=True)
            (run / "checkpoint" / "step-1").mkdir()  # half written
        dist.barrier()
        straight = train(str(run), *overrides, *options, "--checkpoint.interval=2")
        dist.barrier()
        found[mode] = (list(step_folders(run / "checkpoint")), [path.name for path in set_aside(run / "checkpoint")])
    found["spoilt"] = (spoil_weights(f"{out}/spoilt", overrides), list(step_folders(f"{out}/spoilt/checkpoint")))
    if dist.get_rank() == 0:
        spoil(Path(out) / f"sync/checkpoint/step-{STEPS}/__{dist.get_world_size() - 1}_0.distcp")
    dist.barrier()
    again = train(f"{out}/sync", *overrides, "--checkpoint.interval=2")
    found["same"] = all(torch.equal(parameter, again[name]) for name, parameter in straight.items())
    found["after"] = list(step_folders(f"{out}/sync/checkpoint"))
    try:
        if dist.get_rank() == 0:
            for path in complete_steps(f"{out}/sync/checkpoint").values():
                spoil(path / "__0_0.distcp")
        dist.barrier()
        train(f"{out}/sync", *overrides)
    except CheckpointError as error:
        found["none"] = str(error)
    return found


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.slow
def test_what_is_kept_and_what_is_never_written(small_run, tmp_path):
    options = [*small_run, *SAVES, "--parallelism.data_parallel_shard_degree=2"]
    for found in run_distributed(what_is_left, 2, str(tmp_path), options):
        for mode in ("sync", "async"):
            assert found[mode] == ([10, 12], ["abandoned-20200102-000000"]), mode
        (said, step), steps = found["spoilt"]
        assert re.match(
            r"the weights of step 8 are not finite \([\w.]+\), so that they are not saved; step-4 was ", said
        )
        assert (step, steps) == (8, [4])
        assert found["same"], "the run did not go on from step 10 as if nothing had been"
        assert found["after"] == [10, 12]
        assert "none of its checkpoints is sound" in found["none"]
        assert "its digest differs" in found["none"]
    # What was passed over is set aside, like whatever is later than the step that a run goes on from.
    assert "step-12" in {path.name for aside in set_aside(tmp_path / "sync/checkpoint") for path in aside.iterdir()}


@pytest.mark.slow
def test_a_full_disk_is_one_line_of_the_command(small_run, mounts):
    checkpoints = mounts / "run" / "checkpoint"
    checkpoints.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(checkpoints))
    command = [
        *(sys.executable, "-m", "blt_titan", "train", "debug", "--nproc", "2", *small_run, *SAVES),
        *(f"--job.dump_folder={mounts / 'run'}", ASYNC),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode != 0
    assert "step-4: a checkpoint could not be written (No space left on device; " in done.stderr
    assert "nothing was saved before" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_numbers_that_are_not_finite_are_named():
    named = [("a", torch.ones(3)), ("b", torch.tensor([1.0, -torch.inf])), ("c", torch.tensor([torch.nan, 1.0]))]
    assert not are_finite(tensor for _, tensor in named)
    assert not_finite(named) == ["b", "c"]
    largest = torch.finfo(torch.float32).max
    assert are_finite([torch.full((4,), largest), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)])


def test_each_save_is_counted_with_what_training_waited_for_it(monkeypatch):
    monkeypatch.setattr(RunCheckpoints, "_should_save", lambda self, step, last: step % 2 == 0)
    for name in ("_async_wait", "_check_before", "_settle"):
        monkeypatch.setattr(RunCheckpoints, name, lambda *_: None)
    monkeypatch.setattr(CheckpointManager, "save", lambda *_: time.sleep(0.02))
    checkpoints = RunCheckpoints.__new__(RunCheckpoints)
    checkpoints.save_future = None
    for step in range(1, 7):
        checkpoints.save(step)
    saving = checkpoints.take_saving()
    assert saving.saves == 3
    assert saving.waited_s >= 0.06
    assert checkpoints.take_saving() == (0, 0.0)
