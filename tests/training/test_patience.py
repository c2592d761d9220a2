"""Who waits for whom, and for how long: what fails is found before those who wait for it give up."""

import pytest

from blt_titan.config.read import load_run_config
from blt_titan.config.rules.sound import sound
from blt_titan.training.patience import default_limit_s, fetch_timeout_s, others_wait_s, worker_wait_s

DEBUG = ["--job.config_file=train_configs/debug.toml", "--training.dataloader.num_workers=1"]


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(100, 90), (600, 540), (12, 6)])
def test_ranks_are_named_before_a_collective_gives_up(timeout_s, limit_s):
    assert default_limit_s(timeout_s) == limit_s


@pytest.mark.parametrize(
    ("settings", "world_size", "fetch_s", "worker_s"),
    [
        ([], 1, 300, 300),
        ([], 2, 60, 40),
        (["--comm.train_timeout_seconds=12"], 2, 4, 4.8),
        (["--comm.train_timeout_seconds=6000"], 2, 300, 300),
        (["--heartbeat.limit_seconds=30"], 1, 20, 300),
        (["--heartbeat.limit_seconds=30"], 2, 20, 40),
        (["--data.fetch_timeout_s=77", "--data.wait_seconds=7"], 2, 77, 7),
    ],
)
def test_a_store_is_asked_for_less_than_others_wait(settings, world_size, fetch_s, worker_s):
    config = load_run_config([*DEBUG, *settings])
    found = fetch_timeout_s(config.data, config.heartbeat, config.comm, world_size)
    assert found == pytest.approx(fetch_s)
    assert worker_wait_s(config.data, config.comm, world_size) == pytest.approx(worker_s)
    others_s = others_wait_s(config.heartbeat, config.comm, world_size)
    assert others_s is None or found < others_s
    assert sound(config, world_size) == []


@pytest.mark.parametrize(
    ("settings", "world_size", "why"),
    [
        ([], 2, "must be below 90 with comm.train_timeout_seconds = 100, after which ranks"),
        (["--heartbeat.limit_seconds=89"], 2, "must be below heartbeat.limit_seconds = 89, after which ranks"),
        (["--heartbeat.limit_seconds=89"], 1, "must be below heartbeat.limit_seconds = 89, after which ranks"),
    ],
)
def test_a_store_that_is_asked_for_as_long_as_others_wait_is_refused(settings, world_size, why):
    [fault] = sound(load_run_config([*DEBUG, *settings, "--data.fetch_timeout_s=90"]), world_size)
    assert fault.startswith(f"data.fetch_timeout_s = 90: {why}")
    assert sound(load_run_config([*DEBUG, *settings, "--data.fetch_timeout_s=88"]), world_size) == []
    assert sound(load_run_config([*DEBUG, "--data.fetch_timeout_s=9000"]), 1) == []
