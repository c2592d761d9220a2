"""Checkpoints that an earlier commit wrote: they load, go on, and give the numbers that they gave then."""

import json
import tarfile
from pathlib import Path, PurePath
from typing import Any

import pytest

from blt_titan.checkpoint.description import MODEL_KEY, Description
from blt_titan.checkpoint.load import describe_model, fill_state
from blt_titan.checkpoint.read import SafeReader
from blt_titan.patching.rule import PatchRule
from tests.helpers.kept_checkpoint import BLT_ARGS, ENTROPY_ARGS, KEPT, RULE, computed, go_on

RTOL, ATOL = 1e-4, 1e-5
"""fp32 on another CPU, whose kernels add up in another order."""


@pytest.fixture
def kept(tmp_path) -> Path:
    with tarfile.open(KEPT) as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def expected(kept) -> dict[str, Any]:
    return json.loads((kept / "expected.json").read_text())


def test_they_say_what_they_hold_in_version_1(kept):
    for folder, description in (
        (
            kept / "run/checkpoint/step-2",
            Description("blt_entropy", ENTROPY_ARGS, PatchRule("byte", max_patch_bytes=32)),
        ),
        (kept / "blt", Description("blt", BLT_ARGS, RULE, describe_model(kept / "blt").entropies)),
    ):
        assert describe_model(folder) == description
        state = {MODEL_KEY: ""}
        fill_state(state, folder)
        assert json.loads(state[MODEL_KEY])["version"] == 1
    assert len(describe_model(kept / "blt").entropies) == 64


def test_their_models_give_the_same_numbers(kept, expected):
    found = computed(kept)
    assert found["patch_lengths"] == expected["patch_lengths"]
    assert found["continuation"] == expected["continuation"]
    for name in ("entropies_nats", "logits"):
        assert found[name] == pytest.approx(expected[name], rel=RTOL, abs=ATOL), name


@pytest.mark.slow
def test_the_run_goes_on(kept, expected):
    assert go_on(kept) == pytest.approx(expected["losses_nats"], rel=RTOL)


def test_they_name_no_machine(kept):
    assert KEPT.stat().st_size < 200_000
    for path in kept.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(root in content for root in (b"/tmp", b"/home", b"/root", b"/work", b"/Users")), path
        if path.name == ".metadata":
            meta = SafeReader(path.parent).read_metadata().storage_meta
            assert meta is not None
            assert not PurePath(meta.checkpoint_id or "").is_absolute()
