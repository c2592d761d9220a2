"""Bad settings and bad data are one sentence that names the key or the file, before any training work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.config.check import RunConfigError, check_run, load_run_config
from blt_titan.config.rules.target import CARD
from blt_titan.data.store.errors import DataError
from blt_titan.model.blt import BLT
from blt_titan.model.flavors import BLT_FLAVORS

CONFIGS = sorted(Path("train_configs").glob("*.toml"))
DEBUG = "train_configs/debug.toml"


@pytest.fixture
def toml(tmp_path):
    """Write the debug configuration with one line replaced or added, and return its path."""

    def write(old: str, new: str) -> str:
        text = Path(DEBUG).read_text()
        assert old in text
        path = tmp_path / "run.toml"
        path.write_text(text.replace(old, new, 1))
        return f"--job.config_file={path}"

    return write


RANKS = {"debug": 1, "entropy_debug": 1, "blt_8b_256": 256, "blt_8b_1024": 1024}
"""Ranks that a shipped configuration is for; others are for eight."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_tree_is_sound(path, stdlib_data):
    ranks, few = RANKS.get(path.stem, 8), "--data.streams=8"
    # The text of a test has record batches for a few streams alone.
    words = [f"--job.config_file={path}", f"--training.dataset_path={stdlib_data}", *([few] if ranks <= 8 else [])]
    target = CARD if ranks > 1 else None
    check_run(load_run_config(words), world_size=ranks, verify_data=True, look_at_disk=ranks <= 8, target=target)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seq_len =", "seqlen =", r"unknown key training\.seqlen; did you mean training\.seq_len\?"),
        ("[training]", "[trainnig]", r"unknown key trainnig; did you mean training\?"),
        ("steps = 600", 'steps = "1000"', r"training\.steps = '1000' is of the wrong type, must be an integer"),
        ("steps = 600", "steps = true", r"training\.steps = True is of the wrong type"),
        ("lr = 8e-3", 'lr = "big"', r"optimizer\.lr = 'big' is of the wrong type, must be a number"),
        ('flavor = "debug"', "flavor = 3", r"model\.flavor = 3 is of the wrong type, must be a string"),
        ("[job]", "[job", "not valid TOML"),
        ("num_workers = 1", "num_worker = 1", r"unknown key training\.dataloader\.num_worker"),
        ("[job]\n", "comm = 3\n[job]\n", r"comm = 3 must be a table"),
    ],
)
def test_wrong_toml_names_file_and_key(toml, old, new, message):
    with pytest.raises(RunConfigError, match=message) as caught:
        load_run_config([toml(old, new)])
    assert "run.toml" in str(caught.value)


def test_missing_config_file_is_named():
    with pytest.raises(RunConfigError, match=r"nowhere\.toml"):
        load_run_config(["--job.config_file=nowhere.toml"])


def test_command_line_wins_over_toml_and_toml_over_default():
    config = load_run_config([f"--job.config_file={DEBUG}", "--training.steps=7", "--data.seed", "5"])
    assert (config.training.steps, config.data.seed) == (7, 5)
    assert config.data.streams == 120
    assert config.checkpoint.last_save_model_only is False


def test_booleans_are_also_said_as_in_toml():
    said = ["--validation.enable=false", "--compile.enable=true", "--metrics.enable_tensorboard=false"]
    for overrides in (said, ["--validation.no-enable", "--compile.enable", "--metrics.no-enable-tensorboard"]):
        config = load_run_config([f"--job.config_file={DEBUG}", *overrides])
        assert (config.validation.enable, config.compile.enable, config.metrics.enable_tensorboard) == (0, 1, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.stepps=3", r"--training\.stepps=3: unknown key training\.stepps; did you mean training\.steps\?"),
        ("--trainnig.steps=3", r"unknown key trainnig; did you mean training\?"),
        ("--training.no-steps", r"unknown key training\.no_steps"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(RunConfigError, match=message):
        load_run_config([f"--job.config_file={DEBUG}", override])


@pytest.mark.parametrize(
    ("override", "world_size", "message"),
    [
        ("--training.seq_len=1000", 1, r"training\.seq_len = 1000: .*multiple of data\.segment_bytes = 512"),
        ("--validation.seq_len=100", 1, r"validation\.seq_len = 100"),
        ("--patching.max_patch_bytes=513", 1, r"patching\.max_patch_bytes = 513: must be 1 to data\.segment_bytes"),
        (
            "--patching.rule=spaces",
            1,
            r"patching\.rule = 'spaces': must be one of 'space', 'static', 'byte'.*custom_import",
        ),
        ("--patching.rule=static", 1, r"patching\.stride = None: 'static' needs a stride"),
        ("--patching.rule=global", 1, r"rule = 'global' needs patching\.threshold.*blt-titan calibrate"),
        ("--patching.threshold=1.3", 1, r"rule = 'space' takes no patching\.threshold"),
        (
            "--patching.rule=add --patching.threshold=1.3",
            1,
            r"rule = 'add' needs patching\.threshold_add",
        ),
        (
            "--patching.rule=global --patching.threshold=1.3 --patching.source=online",
            1,
            r"source = 'online' with patching\.entropy_checkpoint = None: 'online' needs a checkpoint",
        ),
        (
            "--patching.rule=global --patching.threshold=1.3 --patching.entropy_checkpoint=x",
            1,
            r"source = 'sidecar' with patching\.entropy_checkpoint = 'x'.*'sidecar' takes none",
        ),
        (
            "--patching.source=online",
            1,
            r"source = 'online' with patching\.rule = 'space', which asks for no entropies",
        ),
        (
            "--parallelism.data_parallel_shard_degree=2",
            3,
            r"data_parallel_shard_degree 2 .* makes 2 ranks, but .* gives 3",
        ),
        ("--parallelism.data_parallel_replicate_degree=2", 3, "does not divide 3 ranks"),
        ("--parallelism.data_parallel_shard_degree=0", 1, r"data_parallel_shard_degree = 0: must be at least 1"),
        ("--training.global_batch_size=3", 2, r"training\.global_batch_size = 3: must be a multiple"),
        ("--training.local_batch_size=0", 1, r"training\.local_batch_size = 0"),
        ("--training.steps=0", 1, r"training\.steps = 0: must be at least 1"),
        ("--metrics.log_freq=0", 1, r"metrics\.log_freq = 0: must be at least 1"),
        ("--checkpoint.keep_latest_k=1", 1, r"checkpoint\.keep_latest_k = 1: must be at least 2 .* or 0 to keep all"),
        ("--validation.local_batch_size=0", 1, r"validation\.local_batch_size = 0"),
        ("--checkpoint.create_seed_checkpoint", 2, r"create_seed_checkpoint = true needs one rank"),
        ("--data.streams=7", 2, r"data\.streams = 7: must be a multiple of 2 data-parallel ranks"),
        ("--data.streams=100000", 1, r"data\.streams = 100000: .* record batches.*set data\.streams = \d+"),
        ("--model.flavor=9B", 1, r"model\.flavor = '9B': blt has debug, 20M"),
        ("--model.converters=quantize.linear.mx", 1, r"model\.converters = \['quantize\.linear\.mx'\]: must be"),
        ("--training.dataset_path=/nowhere", 1, r"training\.dataset_path = '/nowhere': no such directory"),
        ("--checkpoint.async_mode=async_with_pinned_mem", 1, r"checkpoint\.async_mode"),
        ("--checkpoint.initial_load_path=/nowhere", 1, r"initial_load_path = '/nowhere': holds no complete checkpoint"),
    ],
)
def test_settings_that_do_not_fit_are_refused(override, world_size, message, stdlib_data):
    overrides = [f"--training.dataset_path={stdlib_data}", "--data.streams=12"]
    config = load_run_config([f"--job.config_file={DEBUG}", *overrides, *override.split()])
    with pytest.raises(RunConfigError, match=message):
        check_run(config, world_size=world_size, verify_data=True)


def test_what_would_be_passed_over_is_refused(stdlib_data, tmp_path):
    model = BLT(BLT_FLAVORS["debug"])
    begin_from = write_checkpoint(model, "blt", model.args, tmp_path / "weights")
    arguments = [f"--job.config_file={DEBUG}", f"--training.dataset_path={stdlib_data}", "--data.streams=12"]
    arguments += [f"--job.dump_folder={tmp_path}", f"--checkpoint.initial_load_path={begin_from}"]
    config = load_run_config(arguments)
    check_run(config, world_size=1, verify_data=False)
    step = tmp_path / "checkpoint" / "step-0"
    step.mkdir(parents=True)  # half written
    with pytest.raises(RunConfigError, match=r"would be passed over, because .*checkpoint is there"):
        check_run(config, world_size=1, verify_data=False)
    step.rmdir()
    begin_from.rename(step)
    check_run(config, world_size=1, verify_data=False)


def test_a_pipeline_needs_no_validation_batch_of_its_own(stdlib_data):
    overrides = [f"--training.dataset_path={stdlib_data}", "--data.streams=12", "--validation.local_batch_size=8"]
    config = load_run_config([f"--job.config_file={DEBUG}", *overrides, "--parallelism.pipeline_parallel_degree=2"])
    check_run(config, world_size=2, verify_data=False)


def test_the_stream_count_that_is_named_fits(stdlib_data):
    overrides = [f"--training.dataset_path={stdlib_data}", "--training.global_batch_size=8"]
    config = load_run_config([f"--job.config_file={DEBUG}", *overrides, "--data.streams=4096"])
    with pytest.raises(RunConfigError) as caught:
        check_run(config, world_size=4, verify_data=False)
    config.data.streams = int(str(caught.value).split("set data.streams = ")[1].split(",")[0])
    check_run(config, world_size=4, verify_data=False)


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-100]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(os.urandom(path.stat().st_size)), id="garbage"),
        pytest.param(damage_middle, id="one_bit"),
        pytest.param(lambda path: path.unlink(), id="missing"),
    ],
)
def test_a_damaged_shard_is_found_before_training(damage, stdlib_data, tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    for path in stdlib_data.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    shard = next(directory.glob("train-*.arrow"))
    damage(shard)
    config = load_run_config(
        [f"--job.config_file={DEBUG}", f"--training.dataset_path={directory}", "--data.streams=12"]
    )
    with pytest.raises(DataError, match=shard.name):
        check_run(config, world_size=1, verify_data=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "override", "words"),
    [
        ({"NGPU": "3"}, "--parallelism.data_parallel_shard_degree=2", "NGPU"),
        ({}, "--training.dataset_path=/nowhere", "training.dataset_path"),
        ({}, "--training.seq_length=4", "--training.seq_length"),
    ],
)
def test_run_train_sh_says_one_sentence_and_fails(environment, override, words, stdlib_data):
    done = subprocess.run(
        ["./run_train.sh", f"--training.dataset_path={stdlib_data}", "--data.streams=12", override],
        env=os.environ | {"CONFIG_FILE": "./train_configs/debug.toml", "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert words in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout


def test_a_mixture_is_set_instead_of_a_path(toml, stdlib_data):
    mixture = f'[data.mixture]\n"{stdlib_data}" = 0.7\n"/nowhere" = 0.3\n\n[data]\nstreams = 120'
    config = load_run_config([toml("[data]\nstreams = 120", mixture)])
    assert config.data.mixture == {str(stdlib_data): 0.7, "/nowhere": 0.3}
    with pytest.raises(RunConfigError, match=r"dataset_path = 'data/stdlib' with data\.mixture of 2 directories"):
        check_run(config, world_size=1, verify_data=False)
    config.training.dataset_path = None
    with pytest.raises(RunConfigError, match=r"data\.mixture: '/nowhere': no such directory"):
        check_run(config, world_size=1, verify_data=False)
    config.data.mixture = {str(stdlib_data): -1.0}
    with pytest.raises(RunConfigError, match=r"data\.mixture = .*-1\.0\}: must be weights above 0"):
        check_run(config, world_size=1, verify_data=False)
    with pytest.raises(RunConfigError, match="must be a table of a number"):
        load_run_config([toml("[data]", "[data]\nmixture = { web = true }")])
