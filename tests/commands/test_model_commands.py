"""Commands that load models: what can be known before is said before, and what cannot be written is one sentence."""

import json
import resource
from pathlib import Path

import pytest

from blt_titan.commands import evaluate, generate, model_options
from blt_titan.commands import export as convert_to_hf
from blt_titan.commands import import_ as convert_from_hf
from tests.helpers.original_weights import write_original


@pytest.fixture
def original(tmp_path) -> Path:
    write_original(tmp_path / "original")
    return tmp_path / "original"


@pytest.fixture
def loads_nothing(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(model_options, "load_for_inference", loaded)
    monkeypatch.setattr(convert_from_hf, "Pretrained", loaded)
    monkeypatch.setattr(convert_to_hf, "stored_weights", loaded)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "{}/nothing"], "{}/nothing: no such file or directory"),
        (["--data", "{}/*.md"], "no documents"),
        (["--data", ""], "--data '': must not be empty"),
        (["--data", "{}", "--entropy-checkpoint", "{}/nothing"], "--entropy-checkpoint {}/nothing: no such directory"),
        (["--data", "{}", "--entropy-checkpoint", "no/model"], "no/model: no such directory"),
        (["--data", "{}", "--stride-bytes", "9000"], "--stride-bytes 9000: must be 1 to --context-bytes 8192"),
        (["--data", "{}", "--out", "{}/no/x.json"], "--out {}/no/x.json: its directory does not exist"),
        (["--data", "{}/x.txt", "--out", "{}/x.txt"], "--out {}/x.txt: is --data {}/x.txt, and would replace it"),
        (["--data", "{}", "--device", "cuda:99"], "--device cuda:99: this machine has"),
    ],
)
def test_evaluation_is_refused_before_a_model_is_loaded(options, said, loads_nothing, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = [option.format(tmp_path) for option in options]
    assert evaluate.main(["--model", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert said.format(tmp_path, tmp_path) in error
    assert error.count("\n") == 1


def test_generation_is_refused_before_a_model_is_loaded(loads_nothing, tmp_path, capsys):
    for options, said in (
        (["--batch", f"{tmp_path}/nothing"], "--batch {}/nothing: no such file"),
        (["--batch", str(tmp_path)], "--batch {}: is a directory, not a file"),
        (["--prompt", "x", "--temperature", "1e-9"], "--temperature 1e-9: must be 0, or a number from 1e-06 to 1,000"),
        (["--prompt", "x", "--max-bytes", "0"], "--max-bytes 0: must be"),
    ):
        assert generate.main(["--model", str(tmp_path), *options]) == 2
        assert capsys.readouterr().err.startswith(f"blt-titan generate: error: {said.format(tmp_path)}")


def test_a_conversion_is_refused_before_a_model_is_loaded(loads_nothing, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    out, entropy_out = ["--out", f"{tmp_path}/a/b"], ["--entropy-out", f"{tmp_path}/a"]
    for options, said in (
        ([], "nothing to write"),
        (["--out", ""], "--out '': must not be empty"),
        (["--out", f"{tmp_path}/there"], "{}/there: is there already"),
        ([*out, "--entropy-out", f"{tmp_path}/there"], "{}/there: is there already"),
        (["--out", f"{tmp_path}/there/file/x"], "--out {}/there/file/x: {}/there/file is not a directory"),
        ([*out, *entropy_out], "--entropy-out {}/a: must not be --out {}/a/b, nor hold it"),
    ):
        assert convert_from_hf.main(["--model", str(tmp_path), *options]) == 2
        assert said.format(tmp_path, tmp_path) in capsys.readouterr().err
    for content, said in (("[]", "an array"), ('{"cut_share": NaN}', "NaN"), ('{"cut_share": "x"}', "'x'")):
        (tmp_path / "lengths.json").write_text(content)
        options = ["--checkpoint", str(tmp_path), "--patch-lengths", f"{tmp_path}/lengths.json"]
        assert convert_to_hf.main([*options, *out]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"blt-titan export: error: --patch-lengths {tmp_path}/lengths.json: ")
        assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.json", "there"]


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_leaves_nothing(original, tmp_path, capsys):
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        assert convert_from_hf.main(["--model", str(original), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.startswith(f"blt-titan import: error: {tmp_path / 'out'}: cannot be written")
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_export_that_cannot_be_written_is_one_sentence_and_leaves_nothing(original, tmp_path, capsys):
    assert convert_from_hf.main(["--model", str(original), "--out", str(tmp_path / "checkpoint")]) == 0
    capsys.readouterr()
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        command = ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out"), "--force"]
        assert convert_to_hf.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"blt-titan export: error: {tmp_path / 'out'}: File too large"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert json.loads((original / "config.json").read_text())
