"""Runs that are watched: a slow rank is named, curves go on after a resume, and a folder says how its run stands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator

from blt_titan.monitor.status import Status, read_status
from blt_titan.training.tensorboard import CHARTS
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import make_trainer, metrics, train

pytestmark = pytest.mark.slow

SLOW_S = 0.1
STARTED: list[subprocess.Popen] = []
"""Each block of the slow rank takes so much longer; one takes a few milliseconds."""


def train_with_a_slow_rank(out: str, overrides: list[str]) -> None:
    trainer = make_trainer(out, *overrides, "--training.steps=8")
    if os.environ["RANK"] == "1":
        for block in trainer.model_parts[0].get_submodule("layers").children():
            block.get_submodule("attention").register_forward_pre_hook(lambda *inputs: time.sleep(SLOW_S))
    trainer.train()
    trainer.close()
    if os.environ["RANK"] == "0":
        # As if the run had been killed in the middle of the save of step 8.
        (Path(out) / "checkpoint/step-8/.metadata").unlink()
    # A machine that is busy with other things must not have its own say here.
    silent = [f"--monitor.{key}=0" for key in ("slow_rank", "data_wait", "throughput_drop", "gradient_spike", "saving")]
    train(out, *overrides, "--training.steps=10", *silent)


@pytest.fixture(scope="module")
def watched(small_run, tmp_path_factory) -> Path:
    """A run on two ranks, one of them slow, which was killed at step 8 and went on from step 4 to 10."""
    out = tmp_path_factory.mktemp("watched") / "run"
    overrides = [*small_run, "--checkpoint.interval=4", "--metrics.enable_tensorboard", "--validation.enable"]
    overrides += ["--validation.steps=2", "--validation.freq=4", f"--monitor.prometheus_textfile={out}/run.prom"]
    run_distributed(train_with_a_slow_rank, 2, str(out), overrides)
    return out


def test_the_rank_that_is_slow_is_named(watched):
    status = json.loads((watched / "status.json").read_text())
    # The second start has not been slow; what the first said of steps that were made again is gone.
    assert status["warning"] is None
    [before] = watched.glob("metrics.jsonl.*")
    lines = [json.loads(line) for line in before.read_text().splitlines()]
    named = [line for line in lines if "slowest_rank" in line]
    assert [line["step"] for line in named] == [6, 7, 8], "the first line warms up, then five are looked at"
    assert all(line["slowest_rank"] == 1 and line["slowest_rank_ratio"] > 2 for line in named)
    assert all(line["saving_share"] > 0 for line in lines if line["step"] > 4 and "loss_nats" in line)


def test_curves_go_on_after_a_resume_without_doubled_steps(watched):
    assert [path.is_file() for path in (watched / "tb").iterdir()] == [True, True], "two starts, one folder"
    in_file = {line["step"]: line["bits_per_byte"] for line in metrics(watched) if "bits_per_byte" in line}
    held_out = {line["step"]: line["heldout_bits_per_byte"] for line in metrics(watched) if "heldout_seconds" in line}
    assert list(in_file) == list(range(1, 11))
    assert list(held_out) == [4, 8, 10]
    events = EventAccumulator(str(watched / "tb"), size_guidance={"scalars": 0}).Reload()
    for tag, wanted in (("loss/bits_per_byte", in_file), ("loss/heldout_bits_per_byte", held_out)):
        read = {event.step: event.value for event in events.Scalars(tag)}
        assert [event.step for event in events.Scalars(tag)] == list(wanted)
        assert read == pytest.approx(wanted, rel=1e-6)
    # What the page itself reads by.
    plugin = PluginAccumulator(str(watched / "tb"), tensor_size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in plugin.Tensors("loss/bits_per_byte")] == list(in_file)
    tags = events.Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"loss", "throughput", "patches", "health"}
    layout = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    assert all(name.encode() in layout for tab in CHARTS for name in (tab, *CHARTS[tab]))


def test_prometheus_has_the_newest_figures(watched):
    samples = (watched / "run.prom").read_text().splitlines()
    assert f'blt_titan_step{{run="{watched}"}} 10' in samples
    assert f'blt_titan_ended_done{{run="{watched}"}} 1.0' in samples


def test_a_run_that_is_done_says_so(watched):
    status = read_status(watched)
    assert (status.state, status.exit_code, status.why) == ("done", 0, "the run is complete")
    assert (status.step, status.steps, status.checkpoint_step, status.world_size) == (10, 10, 10, 2)
    assert status.held_out is not None
    assert status.held_out["step"] == 10


def start(out: Path, small_run: list[str], *overrides: str) -> subprocess.Popen:
    words = [*small_run, f"--job.dump_folder={out}", "--checkpoint.interval=2", *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "blt_titan", "train", "debug", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    """A test that fails leaves no run without end behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def wait_for(process: subprocess.Popen, out: Path, least_step: int) -> Status:
    """Return how the run stands once it has made and logged some steps."""
    deadline = time.monotonic() + 120
    while True:
        # A start before may have come as far.
        status = read_status(out) if (out / "status.json").exists() else None
        if status is not None and status.heard and status.step >= least_step and status.state == "running":
            return status
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_says_how_its_run_stands(small_run, tmp_path):
    """One run: running, killed, preempted, failed."""
    out = tmp_path / "run"
    long = ["--training.steps=100000", "--lr_scheduler.total_steps=100000"]
    process = start(out, small_run, *long)
    status = wait_for(process, out, 4)
    assert (status.state, status.why, status.steps) == ("running", "", 100_000)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while read_status(out).state == "running":  # its rank ends with it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed = read_status(out)
    assert (killed.state, killed.exit_code) == ("killed", None)
    assert killed.checkpoint_step is not None

    process = start(out, small_run, *long)
    status = wait_for(process, out, killed.checkpoint_step + 2)
    assert status.state == "running"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    preempted = read_status(out)
    assert (preempted.state, preempted.exit_code) == ("preempted", 75)
    assert (
        preempted.why
        == f"told to leave by SIGTERM: step {preempted.step} is saved, in " + preempted.why.split("in ")[-1]
    )
    assert preempted.why in said
    assert preempted.checkpoint_step == preempted.step

    process = start(out, small_run, *long, "--optimizer.lr=1e38")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3
    failed = read_status(out)
    assert (failed.state, failed.exit_code) == ("failed", 3)
    assert failed.why in said
    assert "is not finite" in failed.why
