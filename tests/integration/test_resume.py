"""Checkpoints: a run that stops and resumes is the run that never stopped, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, metrics, train

pytestmark = pytest.mark.slow

KEYS = {
    *("step", "loss_nats", "bits_per_byte", "bytes_per_second", "patches_per_second", "mean_patch_bytes"),
    *("padded_byte_share", "padded_patch_share", "grad_norm", "lr", "data_wait_share"),
}

LEGS = ((2, 4, 2), (3, 3, 4))
"""Replicas, rows of a step, and last step: 3 ranks go on after 8 rows."""
LOSS_ATOL = 1e-4
"""Gradients summed in another order; AdamW divides rounding noise by itself."""


def train_straight_and_resumed(out: str, overrides: list[str]) -> tuple[dict, dict]:
    straight = train(f"{out}/straight", *overrides)
    train(f"{out}/resumed", *overrides, "--training.steps=10")
    return straight, train(f"{out}/resumed", *overrides, "--training.steps=20")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--checkpoint.interval=10"], id="sync"),
        pytest.param(["--checkpoint.interval=5", "--checkpoint.async_mode=async"], id="async"),
        pytest.param(["--checkpoint.interval=10", "--training.dataloader.num_workers=2"], id="workers"),
    ],
)
def test_20_steps_equal_10_and_resume_and_10(options, small_run, tmp_path):
    [(straight, resumed)] = run_distributed(train_straight_and_resumed, 1, str(tmp_path), [*small_run, *options])
    assert straight.keys() == resumed.keys()
    for name, parameter in straight.items():
        assert torch.equal(parameter, resumed[name]), name
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")
    assert list(losses(tmp_path / "resumed")) == list(range(1, 21))


def train_then_again_from_an_earlier_step(out: str, overrides: list[str]) -> list[dict]:
    first = train(out, *overrides, "--checkpoint.interval=4", "--training.steps=10")
    # Pull the plug: what step 10 left is half written, as after a crash in the middle of a save.
    (Path(out) / "checkpoint" / "step-10" / ".metadata").unlink()
    next((Path(out) / "checkpoint" / "step-10").glob("*.distcp")).write_bytes(b"torn")
    again = train(out, *overrides, "--checkpoint.interval=4", "--training.steps=10")
    return [first, again]


def test_a_half_written_checkpoint_is_never_picked(small_run, tmp_path):
    [(first, again)] = run_distributed(train_then_again_from_an_earlier_step, 1, str(tmp_path), small_run)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
    # Steps 9 and 10 were made again from step 8; the lines that the crash took back stay beside the new file.
    assert list(losses(tmp_path)) == list(range(1, 11))
    assert len(list(tmp_path.glob("metrics.jsonl.*"))) == 1


def train_then_go_back(out: str, overrides: list[str]) -> list[dict]:
    overrides = [*overrides, "--checkpoint.interval=4", "--training.steps=10", "--checkpoint.keep_latest_k=0"]
    found = [train(out, *overrides), train(out, *overrides, "--checkpoint.load_step=4")]
    # The same command again, as a scheduler gives it: on it goes, until a start without it has the note forgotten.
    train(out, *overrides, "--checkpoint.load_step=4", "--training.steps=11")
    (Path(out) / "gone_on").write_text((Path(out) / "metrics.jsonl").read_text())
    assert (Path(out) / "checkpoint/load_step.json").exists()
    train(out, *overrides, "--training.steps=11")
    assert not (Path(out) / "checkpoint/load_step.json").exists()
    train(out, *overrides, "--checkpoint.load_step=8", "--training.steps=9")
    return found


def train_leg(out: str, overrides: list[str], rows: int, last_step: int) -> None:
    train(out, *overrides, f"--training.global_batch_size={rows}", f"--training.steps={last_step}")


def train_legs(out: str, overrides: list[str]) -> None:
    for _, rows, last_step in LEGS:
        train_leg(out, overrides, rows, last_step)


def test_ranks_that_do_not_divide_the_rows_that_were_served_train_on(small_run, tmp_path):
    run_distributed(train_legs, 1, str(tmp_path / "one"), small_run)
    for ranks, rows, last_step in LEGS:
        replicas = [
            f"--parallelism.data_parallel_replicate_degree={ranks}",
            "--parallelism.data_parallel_shard_degree=1",
        ]
        settings = [*small_run, *replicas]
        run_distributed(train_leg, ranks, str(tmp_path / "several"), settings, rows, last_step)
    one, several = losses(tmp_path / "one"), losses(tmp_path / "several")
    assert list(one) == list(several) == [1, 2, 3, 4]
    for step, loss in one.items():
        assert abs(several[step] - loss) <= LOSS_ATOL, f"step {step}: {several[step]} and {loss}"


def test_going_back_to_an_earlier_step_sets_the_later_ones_aside(small_run, tmp_path):
    """A save over a complete checkpoint would leave its old .metadata beside half-written files."""
    [(first, again)] = run_distributed(train_then_go_back, 1, str(tmp_path), small_run)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
    first, second = sorted((tmp_path / "checkpoint").glob("abandoned-*"))
    assert sorted(path.name for path in first.iterdir()) == ["step-10", "step-8"]
    assert sorted(path.name for path in second.iterdir()) == ["step-10", "step-11"]
    gone_on = [json.loads(line)["step"] for line in (tmp_path / "gone_on").read_text().splitlines()]
    assert gone_on == list(range(1, 12)), "a load_step that is left in a command goes back once"
    assert list(losses(tmp_path)) == list(range(1, 10))


def start_training(out: Path, overrides: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "blt_titan.train", "--job.config_file", "train_configs/debug.toml"),
            *(f"--job.dump_folder={out}", *overrides),
        ],
        env=os.environ
        | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        | {"MASTER_PORT": "29571", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def test_kill_9_during_a_save_leaves_the_last_complete_checkpoint(small_run, tmp_path):
    """Kill a run that saves at every step as soon as a save has begun, twice; each time it goes on."""
    overrides = [*small_run, "--checkpoint.interval=1", "--training.steps=12", "--checkpoint.keep_latest_k=0"]
    checkpoints = tmp_path / "checkpoint"
    for after_step in (3, 6):
        process = start_training(tmp_path, overrides)
        deadline = time.monotonic() + 120
        # The folder of a step appears when its save begins, its .metadata when it ends.
        while not (checkpoints / f"step-{after_step}").exists():
            assert process.poll() is None, "training ended by itself"
            assert time.monotonic() < deadline, "no checkpoint within 120 s"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        complete = sorted(int(p.parent.name[5:]) for p in checkpoints.glob("step-*/.metadata"))
        assert complete, "no complete checkpoint is left"
        assert complete[-1] >= after_step - 1
    process = start_training(tmp_path, overrides)
    assert process.wait(180) == 0
    assert sorted(losses(tmp_path)) == list(range(1, 13))
    [straight] = run_distributed(
        train, 1, str(tmp_path / "straight"), *overrides, "--checkpoint.no-enable", "--debug.seed=0"
    )
    assert straight
    assert losses(tmp_path) == losses(tmp_path / "straight")


def train_twice_and_other_data(out: str, overrides: list[str], other_overrides: list[str]) -> str:
    train(out, *overrides, "--training.steps=2", "--checkpoint.interval=2")
    try:
        train(out, *overrides, *other_overrides, "--training.steps=4")
    except ValueError as error:
        return str(error)
    return "resumed"


def test_a_changed_data_order_is_refused_on_resume(small_run, tmp_path):
    [message] = run_distributed(train_twice_and_other_data, 1, str(tmp_path), small_run, ["--data.streams=6"])
    assert "data.streams = 12" in message
    assert "this run has 6" in message


def test_metrics_have_the_promised_keys(small_run, tmp_path):
    run_distributed(train, 1, str(tmp_path), *small_run, "--training.steps=3", "--validation.enable")
    lines = metrics(tmp_path)
    training = [line for line in lines if "loss_nats" in line]
    held_out = [line for line in lines if "heldout_bits_per_byte" in line]
    assert all(line.keys() >= KEYS for line in training)
    assert len(training) == 3
    assert [line["step"] for line in held_out] == [3]
    assert all(0 <= line["padded_byte_share"] < 1 and 0 <= line["padded_patch_share"] < 1 for line in training)
    assert all(line["bits_per_byte"] > 0 for line in training)
