"""Commands that read or write data: names, inputs and outputs are looked at before anything is made."""

import tomllib
from pathlib import Path

import pytest

from blt_titan.commands import calibrate as calibrate_threshold
from blt_titan.commands import prepare as prepare_data
from blt_titan.commands import score as score_entropies
from blt_titan.commands import view as view_patches
from blt_titan.config.check import check_run, load_run_config
from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.sidecars import sidecar_directory
from blt_titan.scoring.calibration import best_budgets
from tests.helpers.command_data import everything_in, scored_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return scored_data(tmp_path_factory.mktemp("commands"))


@pytest.mark.parametrize("name", ["..", "../../evil", ".", "/tmp/evil", "a/b", ""])
def test_a_sidecar_s_name_leads_nowhere_else(name, data, tmp_path, capsys):
    before = everything_in(data)
    (tmp_path / "checkpoint").mkdir()
    for main, others in (
        (score_entropies.main, ["--checkpoint", str(tmp_path / "checkpoint")]),
        (calibrate_threshold.main, ["--target-patch-bytes", "4"]),
        (view_patches.main, ["--out", str(tmp_path / "page.html")]),
    ):
        assert main(["--data", str(data), "--name", name, *others]) == 2
        said = capsys.readouterr().err
        assert f": error: --name {name!r}: must " in said
        assert said.count("\n") == 1
    with pytest.raises(DataError, match="must be a plain name"):
        sidecar_directory(data, name)
    assert everything_in(data) == before


@pytest.mark.parametrize("option", ["--data", "--checkpoint"])
@pytest.mark.parametrize("given", ["nothing", "", "empty"])
def test_nothing_is_scored_into_a_folder_that_holds_no_data(option, given, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    before = everything_in(tmp_path)
    said = {"--data": str(data), "--checkpoint": str(tmp_path / "empty"), option: given and str(tmp_path / given)}
    assert score_entropies.main([word for pair in said.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    if given != "empty":
        assert f"{option} {said[option] or repr('')}: " in error
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--source", [""]),
        ("--source", ["texts", ""]),
        ("--source", ["nothing"]),
        ("--source", ["no/*.txt"]),
        ("--source", ["texts/*.md"]),
        ("--source", ["empty"]),
        ("--source", ["texts", "empty"]),
        ("--out", [""]),
        ("--out", ["texts/a.txt"]),
        ("--out", ["texts/a.txt/out"]),
        ("--out", ["/proc/out"]),
        ("--work", [""]),
        ("--work", ["texts/a.txt"]),
    ],
)
def test_nothing_is_prepared_from_nothing_nor_to_nowhere(option, values, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    before = everything_in(tmp_path)
    said = {"--source": ["texts"], "--out": ["out"], option: values}
    assert prepare_data.main([word for key, given in said.items() for word in (key, *given)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("blt-titan prepare: error: ")
    assert error.count("\n") == 1
    assert (option if "" in values else values[-1]) in error
    assert everything_in(tmp_path) == before


def test_the_data_layer_takes_no_empty_name_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for sources, out, work in (([""], "out", None), ([tmp_path, ""], "out", None), (["x"], "", None), (["x"], "o", "")):
        with pytest.raises(DataError, match="is empty"):
            prepare(sources, out, work=work, validation_fraction=0, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", ["global", "monotonic", "add"])
@pytest.mark.parametrize(
    "options", [[], ["--segment-patches", "2"], ["--max-patch-bytes", "2"], ["--max-patch-bytes", "65536"]]
)
def test_what_calibration_prints_is_what_a_run_takes(rule, options, data, capsys, monkeypatch):
    target = "1.7" if "2" in options[1:] and "--max-patch-bytes" in options else "3"
    command = ["--data", str(data), "--target-patch-bytes", target, "--rule", rule, "--flavor", "debug"]
    assert calibrate_threshold.main([*command, *options, *([] if options[:1] == ["--segment-patches"] else FEW)]) == 0
    printed = tomllib.loads(capsys.readouterr().out.partition("\n[patching]\n")[2].join(["[patching]\n", ""]))
    overrides = [f"--{section}.{key}={value}" for section, keys in printed.items() for key, value in keys.items()]
    monkeypatch.chdir(ROOT)
    config = load_run_config(
        [
            "--job.config_file=train_configs/debug.toml",
            f"--training.dataset_path={data}",
            *("--data.streams=2", "--validation.no-enable", *overrides),
        ]
    )
    check_run(config, world_size=1, verify_data=False)


FEW = ["--segment-patches", "64"]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--segment-patches", ["0", "1", "-5"]),
        ("--max-patch-bytes", ["0", "1"]),
        ("--target-patch-bytes", ["1", "nan", "inf", "0"]),
        ("--sample-bytes", ["0"]),
        ("--threshold-add", ["nan", "1"]),
        ("--png", ["x.pdf", "no/x.png", ""]),
        ("--json", ["no/x.json", "", "."]),
    ],
)
def test_calibration_is_refused_by_the_option_s_name(option, values, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in values:
        assert calibrate_threshold.main(["--data", str(data), "--target-patch-bytes", "3", option, value]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"blt-titan calibrate: error: {option} {value or repr('')}: ")
        assert captured.err.count("\n") == 1


def test_segments_of_no_patches_are_refused_by_the_package_too():
    with pytest.raises(ValueError, match="segment_patches = 0: must be at least 2"):
        best_budgets([1, 2, 3], cost_of_byte=1, cost_of_patch=1, longest_patch=3, segment_patches=[0, 4])


def test_a_page_is_refused_before_it_is_made(data, tmp_path, capsys):
    page = tmp_path / "page.html"
    for options, said in (
        (["--max-patch-bytes", "0"], "--max-patch-bytes 0: must be a whole number from 1 to 65,536"),
        (["--max-bytes", "0"], "--max-bytes 0: must be"),
        (["--threshold", "nan"], "--threshold nan: must be"),
        (["--doc", "-1"], "--doc -1: must be"),
        (["--checkpoint", str(tmp_path)], f"--checkpoint {tmp_path}: only with --text"),
        (["--out", str(tmp_path)], f"--out {tmp_path}: is a directory"),
        (["--out", ""], "--out '': must not be empty"),
    ):
        assert view_patches.main(["--data", str(data), "--out", str(page), *options]) == 2
        assert f"blt-titan view: error: {said}" in capsys.readouterr().err
    assert not page.exists()
    assert view_patches.main(["--data", str(data), "--out", "/dev/full"]) == 2
    assert capsys.readouterr().err == "blt-titan view: error: /dev/full: No space left on device\n"
