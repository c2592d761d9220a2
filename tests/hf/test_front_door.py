"""A model from a directory, a checkpoint or a run, saved and loaded again without a bit of difference."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blt_titan import BLT, EntropyModel, Patcher, generate
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.patching.rule import PatchRule
from tests.helpers.hf_models import ARGS, RULE, another_model, entropy_model, random_blt

TEXTS = ["to be, or not", "", "é\nvoilà"]
MONOTONIC = PatchRule("monotonic", threshold=0.1, max_patch_bytes=64)
RULES = {
    "inside": RULE,
    "beside": MONOTONIC,
    "short patches": replace(RULE, max_patch_bytes=7),
    "space": PatchRule("space", max_patch_bytes=64),
}


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    parameters = dict(expected.named_parameters())
    assert parameters.keys() == dict(found.named_parameters()).keys()
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def write_run(folder: Path, rule: PatchRule, **entropy_changes) -> Path:
    """A run's folder with a checkpoint, its entropy model as another run beside it."""
    write_checkpoint(random_blt(), "blt", ARGS, folder / "run" / "checkpoint" / "step-7", rule=rule)
    entropy = entropy_model(**entropy_changes)
    write_checkpoint(entropy, "blt_entropy", entropy.args, folder / "entropy" / "checkpoint" / "step-5")
    return folder


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_bare_save_gives_back_every_bit(tmp_path, rule):
    write_run(tmp_path, rule)
    entropy = tmp_path / "entropy" if rule.by_entropy else None
    for kind in ("run", "run/checkpoint/step-7"):
        model = BLT.from_pretrained(tmp_path / kind, entropy_model=entropy)
        assert not model.training
        assert_same(model, random_blt())
        model.save_pretrained(tmp_path / "saved")  # over the one before
        again = BLT.from_pretrained(tmp_path / "saved")
        again.save_pretrained(tmp_path / "twice")
        for found in (again, BLT.from_pretrained(tmp_path / "twice")):
            assert_same(found, model)
            assert found.rule == model.rule == rule
            assert (found.entropy_model is None) == (not rule.by_entropy)
            if rule.by_entropy:
                assert_same(found.entropy_model, entropy_model())
            assert generate(found, TEXTS, max_bytes=12) == generate(model, TEXTS, max_bytes=12)
    lengths = Patcher.from_pretrained(tmp_path / "saved").patch_lengths(TEXTS)
    assert lengths == Patcher.from_pretrained(tmp_path / "run", entropy_model=entropy).patch_lengths(TEXTS)


def test_an_entropy_model_that_forgets_at_newlines_comes_back(tmp_path):
    write_run(tmp_path, RULE, reset_at_newline=True)
    model = BLT.from_pretrained(tmp_path / "run", entropy_model=tmp_path / "entropy")
    model.save_pretrained(tmp_path / "saved")
    found = BLT.from_pretrained(tmp_path / "saved").entropy_model
    assert found is not None
    assert found.args.reset_at_newline
    assert_same(found, entropy_model(reset_at_newline=True))
    assert_same(EntropyModel.from_pretrained(tmp_path / "saved"), found)


def test_what_was_saved_beside_goes_with_the_next_save(tmp_path):
    model = random_blt()
    model.save_pretrained(tmp_path, entropy_model=entropy_model(), rule=MONOTONIC)
    assert (tmp_path / "entropy_model" / "config.json").is_file()
    model.save_pretrained(tmp_path, rule=RULES["space"])
    assert not (tmp_path / "entropy_model").exists()
    assert BLT.from_pretrained(tmp_path).entropy_model is None


def test_the_entropy_model_is_no_part_of_the_blt(tmp_path):
    random_blt().save_pretrained(tmp_path, entropy_model=entropy_model(), rule=RULE)
    model = BLT.from_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters()]
    assert model.entropy_model is model.entropy_model
    assert names == [name for name, _ in model.named_parameters()]
    model.to(torch.bfloat16)
    assert next(model.entropy_model.parameters()).dtype == torch.float32


def test_entropy_models_come_from_runs_too(tmp_path):
    write_run(tmp_path, RULE)
    for kind in ("entropy", "entropy/checkpoint/step-5"):
        assert_same(EntropyModel.from_pretrained(tmp_path / kind), entropy_model())
    with pytest.raises(CheckpointError, match="holds a BLT, not an entropy model"):
        EntropyModel.from_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds an entropy model, not a BLT"):
        BLT.from_pretrained(tmp_path / "entropy")


def test_the_named_entropy_model_is_that_of_training(tmp_path):
    random_blt().save_pretrained(tmp_path / "blt", entropy_model=entropy_model(), rule=RULE)
    another_model().save_pretrained(tmp_path / "another")
    for load in (
        lambda: BLT.from_pretrained(tmp_path / "blt", entropy_model=tmp_path / "another").entropy_model,
        lambda: Patcher.from_pretrained(tmp_path / "blt", entropy_model=another_model()),
    ):
        with pytest.raises(CheckpointError, match="is not the entropy model"):
            load()
    other = BLT.from_pretrained(tmp_path / "blt", entropy_model=another_model(), threshold=2.0)
    assert other.rule == replace(RULE, threshold=2.0)
    assert_same(other.entropy_model, another_model())
    other.save_pretrained(tmp_path / "other")
    assert_same(BLT.from_pretrained(tmp_path / "other").entropy_model, another_model())


def test_what_is_missing_is_said(tmp_path):
    write_run(tmp_path, RULE)
    model = BLT.from_pretrained(tmp_path / "run")
    assert model.entropy_model is None
    with pytest.raises(ValueError, match=r"begin by entropy \(rule 'global'\), and the model comes without .*: pass"):
        generate(model, "to be")
    with pytest.raises(ValueError, match=r"step-7: its patches begin by entropy \(rule 'global'\); pass entropy_model"):
        Patcher.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="does not say where its patches begin: pass rule"):
        generate(random_blt(), "to be")


def test_a_rule_that_is_not_registered_is_named(tmp_path):
    random_blt().save_pretrained(tmp_path, rule=RULES["space"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["blt_titan"]["patching"]["rule"] = "words_of_mine"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"patching\.rule = 'words_of_mine', must be one of 'space'.*--import module"):
        BLT.from_pretrained(tmp_path)


def test_a_patcher_by_name():
    assert Patcher("space").patches(["to be, or", "é a"]) == [[b"to ", b"be,", b" or"], [b"\xc3", b"\xa9 ", b"a"]]
    assert Patcher("static", stride=4).patches("to be, or") == [b"to b", b"e, o", b"r"]
    patcher = Patcher(RULE, entropy_model())
    assert patcher.patch_lengths(TEXTS) == [patcher.patch_lengths(text) for text in TEXTS]
    assert [b"".join(patches).decode() for patches in patcher.patches(TEXTS)] == TEXTS
    for call, message in (
        (lambda: Patcher("words"), "rule = 'words': must be one of"),
        (lambda: Patcher("static"), "'static' needs a stride"),
        (lambda: Patcher("global", threshold=1.0), "needs an entropy model"),
        (lambda: Patcher("space", entropy_model()), "takes no entropy model"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
