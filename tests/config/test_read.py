"""Settings are read from TOML and overrides alike, and what cannot be read is one sentence."""

import pytest

from blt_titan.config.effective import effective_settings
from blt_titan.config.read import RunConfigError, load_run_config, settings_of
from blt_titan.training.run_folder import record_settings

DEBUG = "train_configs/debug.toml"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[job]\ndescription = 'é'\n".encode("latin-1"), r"is not UTF-8, as TOML must be \(byte 21 is 0xe9\)"),
        ("[job]\n".encode("utf-16"), r"is not UTF-8"),
        (b"[job]\rdescription = 'a'\r", r"not valid TOML: .*its lines end in CR alone: save it with LF or CRLF"),
        (b"\xef\xbb\xbf[job]\n", r"not valid TOML"),
        (b"[job]\0", r"not valid TOML"),
        (b"a = " + b"[" * 100_000, r"not valid TOML"),
        (b"a = " + b"1" * 10_000, r"not valid TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_one_sentence(written, message, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(written)
    with pytest.raises(RunConfigError, match=message) as caught:
        load_run_config([f"--job.config_file={path}"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_crlf_is_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"[training]\r\nsteps = 3\r\n")
    assert load_run_config([f"--job.config_file={path}"]).training.steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--job.config_file"], r"--job\.config_file: a value is missing"),
        (["--job.config_file", "--training.steps=3"], r"--job\.config_file: a value is missing"),
        (["--job.config_file=a.toml", "--job.config-file=b.toml"], r"is given 2 times \(a\.toml, b\.toml\)"),
        (["--job.config_file=a\0b"], r"cannot be read"),
        (["--training.steps"], r"--training\.steps: a value is missing"),
        (["--training.steps=3.5"], r"--training\.steps=3\.5: is of the wrong type, must be an integer"),
        (["--training.dataloader=3"], r"training\.dataloader is a section"),
        (["--training.no-gc-debug=true"], r"takes no value; write --training\.gc_debug=false"),
        (["steps=3"], r"'steps=3': an override is --section\.key=value"),
        (["--data.mixture={a"], r"--data\.mixture=\{a: is of the wrong type, must be a table of a number"),
        (["--compile.components=model,lose"], r"must be a list of one of 'model', 'loss'"),
    ],
)
def test_a_wrong_override_is_one_sentence(arguments, message):
    with pytest.raises(RunConfigError, match=message):
        load_run_config(arguments)


def test_overrides_have_the_types_of_their_keys():
    config = load_run_config(
        [
            *("--training.max-norm", "-1", "--debug.seed=None", "--model.converters=a,b", "--compile.components="),
            *('--data.mixture={"data/web" = 0.7, code = 1}', "--lr_scheduler.decay_ratio=0.5", "--job.description=a=b"),
            "--parallelism.module_fqns_per_model_part=[['a'], ['b', 'c']]",
        ]
    )
    assert config.training.max_norm == -1
    assert config.debug.seed is None
    assert config.model.converters == ["a", "b"]
    assert config.compile.components == []
    assert config.data.mixture == {"data/web": 0.7, "code": 1}
    assert config.lr_scheduler.decay_ratio == 0.5
    assert config.job.description == "a=b"
    assert config.parallelism.module_fqns_per_model_part == [["a"], ["b", "c"]]


def test_the_settings_that_a_run_records_give_the_same_run(tmp_path):
    overrides = [f"--job.dump_folder={tmp_path}", "--optimizer.lr=1e-3", '--data.mixture={"data/a b" = 0.3}']
    config = load_run_config([f"--job.config_file={DEBUG}", *overrides, "--training.dataset_path=None"])
    path = record_settings(
        config, command=["--job.config_file=my.toml", *overrides], environment={"NGPU": "2", "NNODES": "1"}
    )
    assert path == tmp_path / "config.toml"
    again = load_run_config([f"--job.config_file={path}"])
    assert settings_of(again) == settings_of(config) | {"job.config_file": str(path)}
    head = path.read_text().split("\n\n")[0]
    assert "blt-titan train my.toml --job.dump_folder=" in head
    assert "--nproc=2\n" in head
    assert f"blt-titan train {path} --nproc=2" in head
    assert effective_settings(again) == effective_settings(config)


def test_settings_of_an_earlier_start_stay_beside_those_of_the_run(tmp_path):
    config = load_run_config([f"--job.dump_folder={tmp_path}"])
    record_settings(config, command=[])
    record_settings(config, command=["the same again"])
    assert len(list(tmp_path.glob("config-*.toml"))) == 0
    config.training.steps = 7
    record_settings(config, command=[])
    [before] = tmp_path.glob("config-*.toml")
    assert load_run_config([f"--job.config_file={before}"]).training.steps == 10000
    assert load_run_config([f"--job.config_file={tmp_path}/config.toml"]).training.steps == 7
