"""`blt-titan config`: prints what a run would have, and checks it."""

import tomllib

from blt_titan.commands.config import main
from blt_titan.commands.run_settings import SHIPPED
from blt_titan.config.read import load_run_config, settings_of


def test_it_prints_a_configuration_of_the_same_settings(capsys, tmp_path):
    overrides = ["--training.steps=7", "--optimizer.lr", "1e-3", '--data.mixture={"data/a b" = 0.3}']
    assert main(["debug", *overrides]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    table = tomllib.loads(captured.out)
    assert (table["training"]["steps"], table["optimizer"]["lr"]) == (7, 1e-3)
    assert table["data"]["segment_bytes"] == 512, "of the file"
    assert table["data"]["on_damage"] == "stop", "a default"
    path = tmp_path / "mine.toml"
    path.write_text(captured.out)
    wanted = load_run_config([f"--job.config_file={SHIPPED / 'debug.toml'}", *overrides])
    found = load_run_config([f"--job.config_file={path}"])
    assert settings_of(found) | {"job.config_file": None} == settings_of(wanted) | {"job.config_file": None}


def test_without_a_configuration_it_prints_the_defaults(capsys):
    assert main([]) == 0
    assert tomllib.loads(capsys.readouterr().out)["training"]["steps"] == 10000


def test_check_says_whether_it_can_be_run(capsys, small_run):
    assert main(["debug", "--check", *small_run]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("debug.toml: can be run on 1 rank\n")
    assert main(["debug", "--check", "--world-size", "3", *small_run]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("blt-titan config: error: training.global_batch_size = 4: must be a multiple of")
    assert captured.err.count("\n") == 1


def test_what_is_wrong_is_one_sentence(capsys):
    for words, said in (
        (["debgu"], "CONFIG 'debgu': no such file"),
        (["debug", "--training.step=5"], "unknown key training.step; did you mean training.steps?"),
        (["debug", "--world-size=0"], "--world-size 0: must be a whole number from 1"),
        (["debug", "--check", "--keys"], "--keys: not allowed with argument --check"),
    ):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_keys_are_listed_with_what_they_mean(capsys):
    assert main(["--keys"]) == 0
    listed = capsys.readouterr().out
    for words in (
        "data.segment_bytes  an integer, default 2048; at least 2",
        "training.steps",
        "Byte slots of one segment of a row",
        "parallelism.expert_parallel_degree  refused: a BLT has no experts",
    ):
        assert words in listed
