"""All faults of a run's settings are shown at once, each on a line, and none that only follows from another."""

import pytest

from blt_titan.commands import config as config_command
from blt_titan.config.read import load_run_config
from blt_titan.config.rules.sound import sound
from blt_titan.config.rules.target import Target

DEBUG = "--job.config_file=train_configs/debug.toml"
FIVE_ROOMS = {
    "--optimizer.lr=-1": "optimizer.lr = -1.0: must be ",
    "--activation_checkpoint.memory_budget=0.3": "activation_checkpoint.memory_budget = 0.3 needs ",
    "--training.global_batch_size=3": "training.global_batch_size = 3: must be a multiple of ",
    "--training.seq_len=1000": "training.seq_len = 1000: a row is a whole number of segments",
    "--lr_scheduler.total_steps=5": "lr_scheduler.total_steps = 5: must be at least ",
}


def test_faults_of_five_rooms_are_five_lines(capsys):
    assert config_command.main(["debug", "--check", *FIVE_ROOMS]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 5
    for line, beginning in zip(lines, FIVE_ROOMS.values(), strict=True):
        assert line.startswith(f"blt-titan config: error: {beginning}")


@pytest.mark.parametrize(
    ("overrides", "world_size", "keys"),
    [
        # Zero segments, ranks and micro-batches would be divided by.
        (["--data.segment_bytes=0"], 1, ["data.segment_bytes"]),
        (["--parallelism.tensor_parallel_degree=0"], 8, ["parallelism.tensor_parallel_degree"]),
        (
            ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=0"],
            2,
            ["parallelism.pipeline_parallel_microbatch_size"],
        ),
        (
            ["--training.seq_len=-7", "--training.local_batch_size=0"],
            1,
            ["training.local_batch_size", "training.seq_len"],
        ),
        # The number of data-parallel ranks and the sizes of the model are not known then.
        (["--parallelism.data_parallel_shard_degree=5", "--data.streams=7"], 3, ["parallelism:"]),
        (["--model.flavor=9B", "--parallelism.tensor_parallel_degree=7"], 7, ["model.flavor", "training.seq_len"]),
        # A rule that is no rule has no threshold that it should have.
        (["--patching.rule=add", "--patching.threshold=nan"], 1, ["patching.threshold"]),
    ],
)
def test_what_only_follows_from_a_fault_is_not_said(overrides, world_size, keys):
    config = load_run_config([DEBUG, *overrides])
    assert [sentence.split(" ")[0] for sentence in sound(config, world_size)] == keys


def test_a_sound_run_has_no_fault():
    assert sound(load_run_config([DEBUG]), 1) == []


@pytest.mark.parametrize(("device", "faults"), [("cpu", 0), ("cuda", 1)])
def test_batches_for_a_gpu_are_page_locked_whatever_a_setting_says(device, faults):
    config = load_run_config([DEBUG, "--training.dataloader.no-pin-memory"])
    target = Target(device, multiplies_float8=False)
    found = [sentence for sentence in sound(config, 1, target) if "pin_memory" in sentence]
    assert len(found) == faults
    assert all("training.dataloader.pin_memory = false: batches for a GPU are always page-locked" in f for f in found)
    assert load_run_config([DEBUG]).training.dataloader.pin_memory, "no word about it is no fault"


@pytest.mark.parametrize(
    ("device", "implementation", "faults"),
    [("cuda", "foreach", 1), ("cuda", "for-loop", 1), ("cuda", "fused", 0), ("cpu", "foreach", 0)],
)
def test_no_step_of_a_gpu_waits_to_hear_whether_it_is_skipped(device, implementation, faults):
    settings = [DEBUG, "--failure.on_nonfinite=skip", f"--optimizer.implementation={implementation}"]
    found = sound(load_run_config(settings), 1, Target(device, multiplies_float8=False))
    assert len([sentence for sentence in found if "on_nonfinite = 'skip': must be 'fused'" in sentence]) == faults


@pytest.mark.parametrize("key", ["heartbeat.limit_seconds", "data.wait_seconds"])
def test_waits_are_over_before_a_collective_gives_up(key):
    settings = [DEBUG, "--comm.train_timeout_seconds=60", "--training.dataloader.num_workers=1"]
    [fault] = sound(load_run_config([*settings, f"--{key}=60"]), 2)
    assert fault.startswith(f"{key} = 60: must be below comm.train_timeout_seconds = 60")
    assert sound(load_run_config([*settings, f"--{key}=59"]), 2) == []
    assert sound(load_run_config([*settings, f"--{key}=60"]), 1) == []


def test_who_has_no_workers_waits_for_none():
    [fault] = sound(load_run_config([DEBUG, "--data.wait_seconds=60", "--training.dataloader.num_workers=0"]), 1)
    assert fault.startswith("data.wait_seconds = 60 with training.dataloader.num_workers = 0: ")
