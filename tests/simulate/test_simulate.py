"""The command: what it says and refuses."""

import json

import pytest

from blt_titan.commands import simulate as command
from blt_titan.config.check import load_run_config
from blt_titan.simulate import simulate
from blt_titan.simulate.ranks import World
from blt_titan.simulate.rates import WorkerRates
from blt_titan.simulate.settings import choose_steps, resumed_world, world_of

DEBUG = ["--config=debug", "--world-size=4", "--workers=1", "--text=40MB", "--record-batch-bytes=8KiB"]
DEBUG += ["--data.streams=24", "--training.local_batch_size=1", "--training.global_batch_size=8"]
BIG, SMALLER = World(1024, 64, 2, 128), World(768, 48, 2, 96)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(simulate, "worker_rates", lambda *_: WorkerRates(100.0, 50.0, 80.0))


def test_a_run_that_goes_on_on_fewer(capsys):
    assert command.main([*DEBUG, "--steps=12", "--resume-on=2", "--step-seconds=0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["conserved"]["faults"] == []
    assert found["conserved"]["rows"] == 96
    assert found["conserved"]["resume_at"] == 6
    assert found["needed_rows_per_s"] == 4.0
    assert found["outcome"]["best_steps"] in [one["steps"] for one in found["outcome"]["intervals"]]


def test_the_report_says_what_was_given_and_found(capsys):
    assert command.main([*DEBUG, "--step-seconds=0.5", "--failures=0", "--intervals", "10", "50"]) == 0
    said = capsys.readouterr().out
    assert "a step in 500.0 ms (given) needs 16 rows/s, 4 of each of 4 ranks" in said
    assert "came once, in its order: none lost, none repeated" in said
    assert "nothing fails" in said
    assert "FAULT" not in said


def test_a_row_that_is_lost_ends_it_with_1(capsys, monkeypatch):
    saved = simulate.save

    def save(state, checkpoint):
        state["positions"][3, 0] += 1
        saved(state, checkpoint)

    monkeypatch.setattr(simulate, "save", save)
    assert command.main([*DEBUG, "--failures=1e-3"]) == 1
    assert "FAULT: order: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--resume-at=9", "--steps=9"], "--steps 9: must be more than the step that is saved, 9"),
        (["--resume-on=5"], "--resume-on 5: data.streams = 24: must be a multiple of 5 data-parallel ranks"),
        (["--parallelism.data_parallel_replicate_degree=2", "--resume-on=1"], "--resume-on 1: "),
        (["--text=1MB", "--record-batch-bytes=64KiB"], "the data has 1"),
        (["--steps=1"], "--steps 1: must be a whole number from 2"),
        (["--straggle=-1"], "--straggle -1: must be a number from 0"),
        (["--intervals", "10", "x"], "--intervals x: must be a whole number"),
        (["--data.streams=25"], "data.streams = 25: must be a multiple of 4 data-parallel ranks"),
    ],
)
def test_what_cannot_be_is_a_sentence(words, says, capsys):
    assert command.main([*DEBUG, *words]) == 2
    assert f"blt-titan simulate: error: {says}" in capsys.readouterr().err


def test_a_run_is_saved_where_the_ranks_that_go_on_do_not_divide_its_rows():
    assert choose_steps(30_720, BIG, SMALLER, None, None) == (561, 241)
    assert choose_steps(30_720, BIG, SMALLER, 20, None) == (20, 10)
    assert choose_steps(30_720, BIG, SMALLER, 24, None) == (24, 13)
    assert choose_steps(30_720, BIG, BIG, 20, None) == (20, 10)
    assert choose_steps(30_720, BIG, SMALLER, 2, None) == (2, 1)
    assert choose_steps(30_720, BIG, SMALLER, None, 300) == (620, 300)
    assert choose_steps(30_720, BIG, SMALLER, 300, 250) == (300, 250)


def test_ranks_that_do_not_divide_the_rows_before_are_said(capsys):
    uneven = [*DEBUG, "--training.global_batch_size=4", "--steps=12", "--resume-on=3", "--step-seconds=0.5"]
    assert command.main([*uneven, "--failures=0", "--resume-at=7"]) == 0
    said = capsys.readouterr().out
    assert "3 ranks do not divide the 28 rows before the resume, and need not: rank 1 makes the next one" in said
    assert "none lost, none repeated" in said
    assert command.main([*uneven, "--failures=0", "--resume-at=6"]) == 0
    assert "do not divide" not in capsys.readouterr().out


def test_a_world_that_the_settings_do_not_fit_is_adapted_and_said():
    config = load_run_config(["--job.config_file=train_configs/blt_8b_1024.toml"])
    assert world_of(config, 1024) == BIG
    world, adapted = resumed_world(config, 768)
    assert world == SMALLER
    assert adapted == [
        "parallelism.data_parallel_replicate_degree=3 (was 2)",
        "training.global_batch_size=96 (was 128)",
    ]
    assert config.training.global_batch_size == 128
