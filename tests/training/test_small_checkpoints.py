"""The manager of a run's checkpoints alone, with one rank and a small layer: when it removes, what it refuses."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.steps import set_aside, step_folder, step_folders
from blt_titan.checkpoint.storage_writer import DigestWriter
from blt_titan.checkpoint.verify import faults
from blt_titan.titan import Checkpoint
from blt_titan.training.checkpointer import RunCheckpoints
from blt_titan.training.failures import NonFiniteLossError
from blt_titan.training.run_folder import LOCK_NAME
from tests.helpers.bits import flip

MODES = pytest.mark.parametrize("mode", ["disabled", "async"])


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Counter:
    """A part of a run with one number as its state."""

    value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Optimizers(Counter):
    def __init__(self, model: nn.Module):
        self._one = torch.optim.AdamW(model.parameters())

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter([self._one])


class Run:
    """Checkpoints of a layer in a folder, every second step."""

    def __init__(self, base: Path, mode: str, keep: int = 2):
        base.mkdir(exist_ok=True)
        (base / LOCK_NAME).touch()
        self.model, self.train_state, self.folder = nn.Linear(30, 30), Counter(), base / "checkpoint"
        self.checkpoints = RunCheckpoints(
            **{"dataloader": Counter(), "model_parts": [self.model], "lr_schedulers": Counter()},
            optimizers=Optimizers(self.model),  # pyright: ignore[reportArgumentType]
            states={"train_state": self.train_state},
            checkpoint_config=Checkpoint(
                enable=True, interval=2, keep_latest_k=keep, async_mode=mode, last_save_model_only=False
            ),
            sd_adapter=None,
            base_folder=str(base),
        )

    def save(self, *steps: int, last: int = 10) -> None:
        for step in steps:
            self.train_state.value = step
            self.checkpoints.save(step, last_step=step == last)

    @property
    def steps(self) -> list[int]:
        return list(step_folders(self.folder))


def wait(run: Run) -> None:
    """Wait until a save beside the training has ended, one way or the other."""
    deadline = time.monotonic() + 60
    while run.checkpoints.save_future is not None and not run.checkpoints.save_future.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@MODES
@pytest.mark.parametrize("keep", [2, 3])
def test_exactly_k_are_left(mode, keep, tmp_path):
    for name in ("abandoned-20200101-000000", "abandoned-20200102-000000"):
        (tmp_path / "checkpoint" / name / "step-3").mkdir(parents=True)
    (tmp_path / "checkpoint" / "step-1").mkdir()
    run = Run(tmp_path, mode, keep)
    run.save(*range(1, 11))
    run.checkpoints.close()
    assert run.steps == [2, 4, 6, 8, 10][-keep:]
    assert [path.name for path in set_aside(run.folder)] == ["abandoned-20200102-000000"]
    for step in run.steps:
        assert list(faults(step_folder(run.folder, step), reads=lambda name: True)) == []


def test_all_are_left_without_a_number(tmp_path):
    (tmp_path / "checkpoint" / "abandoned-20200101-000000").mkdir(parents=True)
    (tmp_path / "checkpoint" / "abandoned-20200102-000000").mkdir()
    run = Run(tmp_path, "disabled", 0)
    run.save(*range(1, 11))
    run.checkpoints.close()
    assert run.steps == [2, 4, 6, 8, 10]
    assert len(set_aside(run.folder)) == 2


def test_nothing_is_removed_before_the_next_is_complete(tmp_path, monkeypatch):
    run = Run(tmp_path, "disabled")
    run.save(2, 4)

    monkeypatch.setattr(DigestWriter, "finish", full_disk)
    with pytest.raises(CheckpointError, match=r"step-6: .*No space left on device; .* GB are free there\); step-4 was"):
        run.save(6)
    assert run.steps == [2, 4, 6]


def test_a_save_beside_the_training_that_fails_is_noticed(tmp_path, monkeypatch):
    run = Run(tmp_path, "async")
    run.save(2)
    wait(run)
    assert not run.checkpoints.has_failed()

    monkeypatch.setattr(DigestWriter, "finish", full_disk)
    run.save(4)
    wait(run)
    assert run.checkpoints.has_failed()
    # It is step 4 that is named, not the one at which it was noticed.
    with pytest.raises(CheckpointError, match=r"step-4: .* \(No space left on device; .*; step-2 was saved before"):
        run.checkpoints.save_now(5)


@MODES
def test_a_flipped_bit_has_the_step_before_taken(mode, tmp_path, caplog):
    run = Run(tmp_path, mode)
    run.save(*range(1, 11))
    wait(run)
    run.checkpoints.close()
    file = run.folder / "step-10" / "__0_0.distcp"
    with flip(file, file.stat().st_size // 2):
        run = Run(tmp_path, mode)
        assert run.checkpoints.load()
        assert run.train_state.value == 8
        with pytest.raises(CheckpointError, match=r"step-10/__0_0\.distcp: entry "):
            run.checkpoints.load(10)
        older = run.folder / "step-8" / "__0_0.distcp"
        with (
            flip(older, older.stat().st_size // 2),
            pytest.raises(CheckpointError, match=r"none of its checkpoints is sound; the last: .*step-8/__0_0\.distcp"),
        ):
            Run(tmp_path, mode).checkpoints.load()
    run = Run(tmp_path, mode)
    assert run.checkpoints.load()
    assert run.train_state.value == 10


@MODES
def test_weights_that_are_not_finite_are_not_saved(mode, tmp_path):
    run = Run(tmp_path, mode)
    run.save(2)
    with torch.no_grad():
        run.model.bias[3] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"step 4 are not finite \(bias\), .*; step-2 was saved before"):
        run.save(4)
    assert run.steps == [2]
    with pytest.raises(NonFiniteLossError):
        run.checkpoints.save_now(5)
    run.save(3)  # not due, not looked at


@MODES
def test_nothing_is_written_where_the_folder_has_gone(mode, tmp_path):
    run = Run(tmp_path / "run", mode)
    run.save(2)
    wait(run)
    run.checkpoints.has_failed()
    os.rename(run.folder, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"step 4 is not saved, .*step-2/\.metadata is gone"):
        run.save(4)
    assert not run.folder.exists()
    os.rename(tmp_path / "elsewhere", run.folder)
    run.save(4)
    wait(run)
    assert run.steps == [2, 4]


def a_peer_is_gone(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")


@MODES
def test_a_rank_that_is_lost_amid_a_save_says_nothing_against_the_folder(mode, tmp_path, monkeypatch):
    run = Run(tmp_path, mode)
    run.checkpoints.save_now(3)
    # What torch calls between ranks once files are written.
    monkeypatch.setattr("torch.distributed.checkpoint.utils._DistWrapper.all_reduce", a_peer_is_gone)
    with pytest.raises(RuntimeError, match="a rank was lost while step 5 was saved; step-3 was saved before"):
        run.checkpoints.save_now(5)


def test_a_rank_that_is_lost_amid_a_load_says_nothing_against_the_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, "disabled")
    run.save(2)
    monkeypatch.setattr("torch.distributed.checkpoint.utils._DistWrapper.reduce_scatter", a_peer_is_gone)
    with pytest.raises(RuntimeError, match=r"a rank was lost while .*step-2 was read"):
        run.checkpoints.load(2)
