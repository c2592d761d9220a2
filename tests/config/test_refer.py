"""What settings refer to is looked at without reading weights, and an entropy model is read once in a process."""

import pytest

from blt_titan.checkpoint import load as description
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.config import refer
from blt_titan.config.check import RunConfigError, check_run
from blt_titan.config.read import load_run_config
from blt_titan.hf.tensors import StoredTensors
from blt_titan.model.blt import BLT
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.training.data import row_source
from tests.helpers.small_entropy_model import model_of

DEBUG = "--job.config_file=train_configs/debug.toml"


@pytest.fixture
def online_run(small_run, tmp_path):
    """Settings of a run that scores its text while it trains, and exports."""
    model = model_of()
    write_checkpoint(model, "blt_entropy", model.args, tmp_path / "entropy")
    return [
        *(DEBUG, *small_run, f"--job.dump_folder={tmp_path / 'run'}", "--validation.enable"),
        *("--patching.rule=global", "--patching.threshold=1.5", "--patching.source=online"),
        *(f"--patching.entropy_checkpoint={tmp_path / 'entropy'}", "--patching.max_patch_bytes=128"),
        *("--export.hf_every=1", "--export.force"),
    ]


@pytest.fixture
def reads(monkeypatch):
    """Note whose weights are read."""
    found: list[str] = []
    load_weights, rows = description.load_weights, StoredTensors.rows

    def noted_load(model, checkpoint):
        found.append(str(checkpoint))
        load_weights(model, checkpoint)

    def noted_rows(self, *where):
        found.append("a tensor")
        return rows(self, *where)

    monkeypatch.setattr(description, "load_weights", noted_load)
    monkeypatch.setattr(StoredTensors, "rows", noted_rows)
    return found


def test_a_run_that_begins_reads_its_entropy_model_when_it_scores(online_run, reads):
    config = load_run_config(online_run)
    check_run(config, world_size=1, verify_data=True)
    assert reads == [], "what a model is, its description says"
    for split in ("train", "validation"):
        row_source(config.data, config.training, config.patching, split, seq_len=config.training.seq_len)
    assert len(reads) == 1


def test_a_run_that_goes_on_reads_its_entropy_model_once(online_run, reads, monkeypatch, tmp_path):
    config = load_run_config(online_run)
    # A checkpoint of this run, whose position is right.
    monkeypatch.setattr(refer, "checkpoint_to_load", lambda config: tmp_path / "step-5")
    monkeypatch.setattr(refer, "loads_weights_only", lambda config, checkpoint: False)
    monkeypatch.setattr(refer, "check_model", lambda *args, **options: None)
    monkeypatch.setattr(refer, "saved_position", lambda checkpoint: ({}, 0))
    positions = []
    monkeypatch.setattr(refer, "check_continues", lambda *args, **options: positions.append(args))
    check_run(config, world_size=1, verify_data=False)
    assert len(positions) == 1, "the digest of the model is compared"
    for split in ("train", "validation"):
        row_source(config.data, config.training, config.patching, split, seq_len=config.training.seq_len)
    assert len(reads) == 1


def test_ranks_after_the_first_of_a_node_look_at_no_file(online_run, monkeypatch):
    monkeypatch.setattr("blt_titan.config.check.refer", lambda *args, **options: pytest.fail("looked at disk"))
    check_run(load_run_config(online_run), world_size=1, verify_data=False, look_at_disk=False)


def test_an_entropy_model_is_one(online_run, tmp_path):
    model = BLT(BLT_FLAVORS["debug"])
    write_checkpoint(model, "blt", model.args, tmp_path / "blt")
    config = load_run_config([*online_run, f"--patching.entropy_checkpoint={tmp_path / 'blt'}"])
    with pytest.raises(RunConfigError, match=r"patching\.entropy_checkpoint = .*holds a model 'blt', not an entropy"):
        check_run(config, world_size=1, verify_data=False)


def test_all_that_is_missing_on_disk_is_said_at_once(small_run, tmp_path):
    missing = tmp_path / "nothing"
    config = load_run_config(
        [
            *(DEBUG, *small_run, f"--job.dump_folder={tmp_path / 'run'}", f"--training.dataset_path={missing}"),
            *("--checkpoint.load_step=3",),
        ]
    )
    with pytest.raises(RunConfigError) as raised:
        check_run(config, world_size=1, verify_data=True)
    said = raised.value.sentences
    assert len(said) == 2
    assert "checkpoint.load_step = 3" in said[0]
    assert f"training.dataset_path = {str(missing)!r}: no such directory" in said[1]
