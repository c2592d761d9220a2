"""`--import MODULE`: every command that runs a model registers the user's patching rule first."""

import sys

import pytest

from blt_titan.commands import import_
from blt_titan.hf.export import stored_weights
from blt_titan.patching import registry
from blt_titan.patching.rule import PatchRule
from tests.helpers.hf_models import random_blt
from tests.helpers.verbs import module_of

RULE = """from blt_titan.patching.registry import register_rule

register_rule("fours", lambda rule, ids, entropies_nats: ids % 4 == 0)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory of a BLT with a rule of the user's, whose module lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    (tmp_path / "fours_rule.py").write_text(RULE)
    registry.register_rule("fours", lambda rule, ids, nats: ids % 4 == 0)
    random_blt().save_pretrained(tmp_path / "own", rule=PatchRule("fours"))
    del registry._KINDS["fours"]
    yield tmp_path
    sys.modules.pop("fours_rule", None)


def test_a_directory_becomes_a_checkpoint_with_its_rule(own, capsys):
    command = ["--model", str(own / "own"), "--out", str(own / "ckpt")]
    assert import_.main(command) == 2
    assert "rule = 'fours'" in capsys.readouterr().err
    assert import_.main([*command, "--import", "fours_rule"]) == 0
    assert stored_weights(own / "ckpt").rule == PatchRule("fours")


def test_a_text_is_continued_by_it(own, capsys):
    command = ["--model", str(own / "own"), "--prompt", "to be", "--max-bytes", "3"]
    assert module_of("generate").main(command) == 2
    assert "'fours'" in capsys.readouterr().err
    assert module_of("generate").main([*command, "--import", "fours_rule"]) == 0


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("generate", ["--prompt", "x"]),
        ("evaluate", ["--data", "fours_rule.py"]),
        ("harness", ["--tasks", "piqa"]),
        ("import", ["--out", "ckpt"]),
        ("export", ["--out", "hf"]),
    ],
)
def test_a_module_that_is_not_there_is_named(own, capsys, verb, arguments):
    if verb == "harness":
        pytest.importorskip("lm_eval", reason="install the dev extra to run EleutherAI's harness")
    model = ["--checkpoint" if verb == "export" else "--model", str(own / "own")]
    assert module_of(verb).main([*model, *arguments, "--import", "no_such_rule"]) == 2
    assert f"blt-titan {verb}: error: --import 'no_such_rule': cannot be imported" in capsys.readouterr().err
