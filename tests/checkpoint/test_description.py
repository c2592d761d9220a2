"""What a checkpoint says of its model: it comes back, and what is not known is refused by name."""

import json
from dataclasses import fields, replace

import pytest

from blt_titan.checkpoint.description import MODEL_KINDS, VERSION, Description, identity
from blt_titan.checkpoint.json_fields import _ARGS
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.patching.rule import PatchRule

BLT = Description("blt", BLTArgs(), PatchRule("global", threshold=1.5, max_patch_bytes=64, storage="uint8"), "a1b2")
ENTROPY = Description("blt_entropy", EntropyModelArgs())


def changed(**changes) -> str:
    content = json.loads(BLT.to_json()) | changes
    return json.dumps({key: value for key, value in content.items() if value is not ...})


def test_it_comes_back():
    for description in (BLT, ENTROPY):
        assert Description.from_json(description.to_json(), "x") == description


def test_every_argument_has_bounds():
    """A new argument is one more thing that a checkpoint of this version does not say: raise VERSION."""
    for kind in MODEL_KINDS.values():
        assert set(_ARGS[kind]) == {field.name for field in fields(kind) if field.metadata.get("stored", True)}
    assert VERSION == 1


@pytest.mark.parametrize("described", [BLT, ENTROPY], ids=["blt", "entropy"])
def test_how_a_run_attended_is_its_own_matter(described):
    """A model that was trained on a GPU is read where there is none."""
    args = replace(described.args, attention_backend="varlen", varlen_documents=3)
    read = Description.from_json(replace(described, args=args).to_json(), "x")
    assert read == described


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (changed(version=2), "x: says version 2 of what a checkpoint holds, this release reads version 1 alone"),
        (changed(version=...), "x: says no version"),
        (changed(version=True), "x: says version True"),
        (changed(version=2, more=1, name=5), "says version 2"),
        (changed(more=1), "x: more is not known; known are version, name, args, patching, entropies"),
        (changed(args=json.loads(BLT.to_json())["args"] | {"more": 1}), r"x: args\.more is not known"),
        (changed(args={"local_dim": 8}), r"x: args\.local_heads is missing"),
        (changed(patching=...), "x: patching is missing"),
        (changed(entropies=...), "x: entropies is missing"),
        (changed(patching={"rule": "space", "more": 1}), r"x: patching\.more is not known"),
    ],
)
def test_what_is_not_known_is_refused_by_name(content, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Description.from_json(content, "x")


def test_difference_is_in_what_makes_the_model():
    assert BLT.difference(BLT) is None
    assert str(BLT.difference(ENTROPY)) == "is of a model 'blt'"
    for field in fields(BLTArgs):
        other = {int: 7, float: 7.5, bool: "no", str: "x", tuple: (1, 2)}[type(getattr(BLT.args, field.name))]
        args = replace(BLT.args)
        setattr(args, field.name, other)
        found = BLT.difference(replace(BLT, args=args))
        assert (found is None) == (field.name not in identity(BLT.args)), field.name
    args = replace(BLT.args, hash_ngrams=(1, 2))
    assert str(BLT.difference(replace(BLT, args=args))) == (
        "is of a model with hash_ngrams = [3, 4, 5, 6, 7, 8], this run has [1, 2]"
    )


def test_how_weights_were_drawn_is_not_the_model():
    assert identity(BLT.args).keys() == {field.name for field in fields(BLTArgs)} - {
        *("init_seed", "init_depth_scaling", "attention_backend", "nominal_patch_bytes", "varlen_documents")
    }
    assert identity(ENTROPY.args).keys() == {
        *("dim", "n_heads", "n_layers", "ffn_hidden", "window", "rope_theta", "reset_at_newline")
    }
