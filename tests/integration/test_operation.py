"""What happens to a run in a folder: other settings on resume, another model, damage, a second run, a full disk."""

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.config.check import check_run, load_run_config
from blt_titan.config.read import RunConfigError
from blt_titan.training.failures import NonFiniteLossError
from blt_titan.training.run_folder import RunFolderError, RunLock, try_folder
from tests.helpers.attacks import Attack
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, make_trainer, metrics, train

pytestmark = pytest.mark.slow


class Said(logging.Handler):
    """Collects what is logged by anyone."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        for name in (None, "blt_titan.config.resume"):
            logging.getLogger(name).addHandler(self)
        logging.getLogger("blt_titan.config.resume").setLevel(logging.INFO)
        logging.getLogger().setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def refusal(call, *args: str) -> str:
    try:
        call(*args)
    except (RunConfigError, CheckpointError, RunFolderError, NonFiniteLossError) as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def resume_with_other_settings(out: str, overrides: list[str]) -> dict:
    said = Said()
    overrides = [*overrides, "--checkpoint.interval=2"]
    train(out, *overrides, "--training.steps=2", "--optimizer.lr=0.25", "--optimizer.weight_decay=0.3")
    other = ["--optimizer.lr=1e-3", "--optimizer.weight_decay=0.01", "--optimizer.beta1=0.8", "--optimizer.beta2=0.9"]
    other += ["--optimizer.eps=1e-6", "--optimizer.name=Adam", "--optimizer.implementation=for-loop"]
    other += ["--training.max_norm=inf"]
    fresh = make_trainer(f"{out}/fresh", *overrides, *other)
    wanted = [
        {k: v for k, v in group.items() if k != "params"} for group in fresh.optimizers.optimizers[0].param_groups
    ]
    schedule = fresh.lr_schedulers.schedulers[0].lr_lambdas[0]
    fresh.close()
    train(out, *overrides, *other, "--training.steps=3", "--checkpoint.interval=1")
    trainer = make_trainer(out, *overrides, *other, "--training.steps=4")
    trainer.train()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizers.optimizers[0].param_groups]
    trainer.close()
    for group, lr in zip(wanted, [1e-3 * schedule(4)] * len(wanted), strict=True):
        group["lr"] = lr
    return {
        "wanted": wanted,
        "groups": groups,
        "schedule": {step: 1e-3 * schedule(step - 1) for step in (3, 4)},
        "said": [line for line in said.lines if line.startswith("resumed with")],
    }


def test_a_resume_keeps_the_optimizer_settings_that_the_run_says(small_run, tmp_path):
    [found] = run_distributed(resume_with_other_settings, 1, str(tmp_path), small_run)
    assert found["groups"] == found["wanted"]
    assert found["groups"][0]["decoupled_weight_decay"] is False
    assert {line["step"]: line["lr"] for line in metrics(tmp_path) if line["step"] > 2} == found["schedule"]
    assert "resumed with lr 0.001 (was 0.25)" in found["said"]
    assert "resumed with weight_decay 0.01 (was 0.3)" in found["said"]
    assert "resumed with name 'Adam' (was 'AdamW')" in found["said"]
    assert "resumed with training.max_norm 'inf' (was 1.0)" in found["said"]
    assert found["said"][-1] == "resumed with training.steps 4 (was 3)"


def resume_what_cannot_be(out: str, overrides: list[str]) -> dict[str, str]:
    found, said = {}, Said()
    overrides = [*overrides, "--checkpoint.interval=2", "--training.steps=4"]
    train(out, *overrides)
    for name, other in {
        "flavor": ["--model.flavor=20M"],
        "name": ["--model.name=blt_entropy", "--patching.rule=byte", "--data.segment_patches=128"],
        "streams": ["--data.streams=6"],
        "rule": ["--patching.rule=static", "--patching.stride=4"],
    }.items():
        found[name] = refusal(train, out, *overrides, *other)
    entropy = [f"--checkpoint.initial_load_path={out}/checkpoint/step-4", "--model.name=blt_entropy"]
    found["initial"] = refusal(
        train, f"{out}/2", *overrides, *entropy, "--patching.rule=byte", "--data.segment_patches=128"
    )
    (Path(out) / "checkpoint/step-2/.metadata").rename(Path(out) / "kept")
    found["load_step"] = refusal(train, out, *overrides, "--checkpoint.load_step=2")
    (Path(out) / "kept").rename(Path(out) / "checkpoint/step-2/.metadata")

    # A machine that stopped: a shard of step 4 cut short, zeros at the end of the metrics.
    [shard] = (Path(out) / "checkpoint/step-4").glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with (Path(out) / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 512)
    before = losses_of_first(out)
    train(out, *overrides)
    found["passed over"] = "\n".join(line for line in said.lines if "passed over" in line or "damaged" in line)
    found["same again"] = str(before == losses_of_first(out))
    for step in ("step-2", "step-4"):
        (Path(out) / "checkpoint" / step / ".metadata").write_bytes(b"")
    found["none"] = refusal(train, out, *overrides)
    for step in ("step-2", "step-4"):
        (Path(out) / "checkpoint" / step / ".metadata").write_bytes(pickle.dumps(Attack(Path(out) / "executed")))
    found["strange"] = refusal(train, out, *overrides)
    begin_from = f"--checkpoint.initial_load_path={out}/checkpoint/step-2"
    found["strange initial"] = refusal(train, f"{out}/3", *overrides, begin_from)
    found["executed"] = str((Path(out) / "executed").exists())
    return found


def losses_of_first(out: str) -> dict[int, float]:
    lines = (Path(out) / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return {line["step"]: line["loss_nats"] for line in map(json.loads, lines)}


def test_what_cannot_be_resumed_is_refused_by_key_and_damage_is_passed_over(small_run, tmp_path):
    [found] = run_distributed(resume_what_cannot_be, 1, str(tmp_path), small_run)
    assert "RunConfigError: model.flavor = '20M': " in found["flavor"]
    assert "step-4 is of a model with" in found["flavor"]
    assert "(it is model.flavor = 'debug')" in found["flavor"]
    assert "RunConfigError: model.name = 'blt_entropy': " in found["name"]
    assert "step-4 is of a model 'blt'" in found["name"]
    assert "RunConfigError" in found["streams"]
    assert "data.streams = 12, this run has 6" in found["streams"]
    assert "patching.rule = 'space', this run has 'static'" in found["rule"]
    assert "RunConfigError: model.name = 'blt_entropy': " in found["initial"]
    assert "checkpoint.load_step = 2: " in found["load_step"]
    assert "step-2/.metadata" in found["load_step"]
    assert "__0_0.distcp: is cut short" in found["passed over"]
    assert "metrics.jsonl: 1 lines are damaged" in found["passed over"]
    assert found["same again"] == "True"
    assert "CheckpointError: " in found["none"]
    assert "none of its checkpoints is sound" in found["none"]
    assert "begin anew" in found["none"]
    assert "none of its checkpoints is sound" in found["strange"]
    assert "RunConfigError: checkpoint.initial_load_path = " in found["strange initial"]
    assert found["executed"] == "False", "a checkpoint ran code"


def operate(out: str, overrides: list[str]) -> dict:
    found: dict = {}
    folder = Path(out)

    # A gradient that is not finite, in the last of a few steps that none is logged of or saved after.
    trainer = make_trainer(f"{out}/bad", *overrides, "--checkpoint.no-enable", "--metrics.log_freq=100")
    forward = trainer.forward_backward_step

    def poisoned(**kwargs):
        loss = forward(**kwargs)
        if trainer.step == trainer.job_config.training.steps:
            next(trainer.model_parts[0].parameters()).grad.fill_(torch.nan)
        return loss

    trainer.forward_backward_step = poisoned
    found["bad"] = refusal(trainer.train)
    trainer.close()

    # A folder that cannot take the checkpoint, and a metrics file that cannot be opened.
    said = Said()
    (folder / "full/checkpoint").mkdir(parents=True)
    (folder / "full/checkpoint/step-2").write_text("in the way")
    (folder / "full/metrics.jsonl").mkdir()
    (folder / "full/tb").write_text("in the way")
    found["full"] = refusal(train, f"{out}/full", *overrides, "--checkpoint.interval=2", "--metrics.enable_tensorboard")
    found["warned"] = [line for line in said.lines if "metrics cannot be written" in line]
    found["warned of TensorBoard"] = [line for line in said.lines if "TensorBoard's files cannot be written" in line]

    # Weights alone. Ranks that do not divide the rows that were served may go on.
    train(f"{out}/weights", *overrides, "--checkpoint.last_save_model_only")
    found["weights"] = refusal(train, f"{out}/weights", *overrides, "--training.steps=4")

    # Steps after a step that is chosen again are kept aside; so is everything after a seed checkpoint.
    steps = [*overrides, "--training.steps=2", "--checkpoint.interval=1", "--metrics.log_freq=100"]
    trainer = make_trainer(f"{out}/seed", *steps)
    trainer.checkpointer.save(0, last_step=True)
    trainer.close()
    train(f"{out}/seed", *steps)
    found["logged"] = [line["step"] for line in metrics(f"{out}/seed")]
    train(f"{out}/seed", *steps, "--checkpoint.load_step=0")
    [aside] = (folder / "seed/checkpoint").glob("abandoned-*")
    found["aside"] = sorted(path.name for path in aside.iterdir())
    found["steps"] = sorted(path.name for path in (folder / "seed/checkpoint").glob("step-*"))
    found["config"] = (folder / "seed/config.toml").read_text()
    many = [*steps, "--training.global_batch_size=12", "--data.segment_bytes=128", f"--job.dump_folder={out}/seed"]
    config = load_run_config(["--job.config_file=train_configs/debug.toml", *many])
    found["many"] = refusal(lambda: check_run(config, world_size=12, verify_data=False))
    seeds = ["--checkpoint.create_seed_checkpoint"]
    found["seed"] = refusal(make_trainer, f"{out}/seed", *steps, *seeds)
    return found


def test_faults_while_it_runs(small_run, tmp_path):
    [found] = run_distributed(operate, 1, str(tmp_path), [*small_run, "--training.steps=3"])
    assert "NonFiniteLossError" in found["bad"]
    assert "step 3 is not finite" in found["bad"]
    assert "CheckpointError: " in found["full"]
    assert "/full/checkpoint/step-2: a checkpoint could not be written (" in found["full"]
    assert len(found["warned"]) == 1, "said once"
    assert len(found["warned of TensorBoard"]) == 1
    assert "step-3: holds weights alone (checkpoint.last_save_model_only" in found["weights"]
    assert found["many"] == "went on"
    assert "step-0 is there already" in found["seed"]
    assert found["logged"] == [1, 2], "the first and the last step are logged, whatever log_freq is"
    assert found["aside"] == ["step-1", "step-2"]
    assert found["steps"] == ["step-0", "step-1", "step-2"]
    assert "load_step" not in found["config"].split("\n\n", 1)[1], "else each resume would go back again"


HOLD = """
import sys, time
from blt_titan.training.run_folder import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_leaves_no_lock(tmp_path, stdlib_data):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            RunFolderError, match=rf"another run writes there \(process {holder.pid} on host \S+, since"
        ):
            RunLock(tmp_path)
        check = subprocess.run(
            [
                *(sys.executable, "-m", "blt_titan.config.check", "--job.config_file=train_configs/debug.toml"),
                *(f"--training.dataset_path={stdlib_data}", "--data.streams=12", f"--job.dump_folder={tmp_path}"),
            ],
            capture_output=True,
            text=True,
        )
        assert check.returncode == 2
        assert f"error: job.dump_folder = '{tmp_path}': another run writes there (process {holder.pid}" in check.stderr
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    deadline = time.monotonic() + 5
    while True:
        try:
            RunLock(tmp_path).release()
            break
        except RunFolderError:
            assert time.monotonic() < deadline, "a killed run left its lock"


@pytest.mark.parametrize("folder", ["/proc/x", "file/x"])
def test_a_folder_that_cannot_be_written_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for take in (RunLock, try_folder):
        with pytest.raises(RunFolderError, match=r"job\.dump_folder = '.*': cannot be written"):
            take(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_try_leaves_a_folder_as_it_was(tmp_path):
    try_folder(tmp_path / "not/yet/there")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    try_folder(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    lock = RunLock(tmp_path / "run")
    lock.release()
    try_folder(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="to fill a disk, run as root on Linux")
def test_a_full_disk_is_one_sentence(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs a privilege that this container lacks")
    try:
        with pytest.raises(OSError, match="No space left"):
            (small / "filler").write_bytes(b"\0" * 65536)
        with pytest.raises(
            RunFolderError, match=r"cannot be written \(No space left on device\); choose another, or make"
        ):
            RunLock(small)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_run_goes_on_by_what_it_recorded(small_run, tmp_path):
    """The settings in `<folder>/config.toml` alone are the same run."""
    overrides = [*small_run, "--checkpoint.interval=2"]
    run_distributed(train, 1, str(tmp_path / "a"), *overrides, "--training.steps=2")
    straight = losses(tmp_path / "a")
    recorded = tmp_path / "a/config.toml"
    done = subprocess.run(
        [sys.executable, "-m", "blt_titan.train", f"--job.config_file={recorded}", "--training.steps=3"],
        env=os.environ
        | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29573"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses(tmp_path / "a")) == [1, 2, 3]
    assert {step: loss for step, loss in losses(tmp_path / "a").items() if step < 3} == straight


def resume_a_pipeline(out: str, overrides: list[str]) -> dict:
    overrides = [*overrides, "--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"]
    overrides += ["--parallelism.pipeline_parallel_schedule=Interleaved1F1B", "--training.global_batch_size=2"]
    overrides += ["--checkpoint.interval=1"]
    train(out, *overrides, "--training.steps=1", "--optimizer.lr=1e-2")
    trainer = make_trainer(out, *overrides, "--training.steps=2", "--optimizer.lr=1e-3", "--optimizer.beta1=0.7")
    trainer.train()
    groups = [group for optimizer in trainer.optimizers.optimizers for group in optimizer.param_groups]
    trainer.close()
    (Path(out) / "checkpoint/step-2/.metadata").write_bytes(b"")
    damaged = refusal(make_trainer(out, *overrides, "--training.steps=3", "--optimizer.lr=1e-3").train)
    return {"betas": [group["betas"] for group in groups], "damaged": damaged}


def test_two_stages_resume_with_the_settings_that_the_run_says(small_run, tmp_path):
    """Each rank has two optimizers; rank 0 chooses the step for both."""
    found = run_distributed(resume_a_pipeline, 2, str(tmp_path), small_run)
    assert [rank["betas"] for rank in found] == [[(0.7, 0.95)] * 2] * 2
    assert [rank["damaged"] for rank in found] == ["went on"] * 2
    lr = {line["step"]: line["lr"] for line in metrics(tmp_path)}
    assert lr[1] == 5e-3
    assert lr[2] == 1e-3
    assert 0 < lr[3] <= 1e-3
