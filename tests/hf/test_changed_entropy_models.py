"""The entropy model inside a directory is the one that was exported, or is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_titan import BLT, EntropyModel, Patcher
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.commands import generate
from blt_titan.commands import import_ as convert_from_hf
from blt_titan.hf.export import export_hf, stored_weights
from blt_titan.hf.load import load_for_inference
from blt_titan.hf.pretrained import Pretrained
from tests.helpers.hf_models import RULE, another_model, entropy_model, random_blt


def resave(directory: Path, out: Path, dtype: torch.dtype) -> Path:
    """Save as transformers does: the configuration as it is, the weights in another type."""
    shutil.copytree(directory, out)
    tensors = load_file(directory / "model.safetensors")
    save_file({name: t.to(dtype).clone() for name, t in tensors.items()}, out / "model.safetensors")
    return out


def test_an_entropy_model_that_was_changed_is_refused(sound, tmp_path, capsys):
    blt, entropy = stored_weights(sound / "blt"), stored_weights(sound / "entropy")
    whole = export_hf(blt, tmp_path / "bf16", entropy=entropy, dtype=torch.bfloat16)
    assert load_for_inference(whole).entropy_model is not None
    Patcher.from_pretrained(resave(sound / "hf", tmp_path / "again", torch.float64))
    changed = resave(sound / "hf", tmp_path / "changed", torch.bfloat16)
    sentence = "its entropy model is not the one that was exported.*--entropy-checkpoint"
    for load in (EntropyModel, Patcher):
        with pytest.raises(CheckpointError, match=sentence):
            load.from_pretrained(changed)
        load.from_pretrained(changed, allow_changed=True)
    for threshold in (None, RULE.threshold):
        with pytest.raises(CheckpointError, match=sentence):
            load_for_inference(changed, threshold=threshold)
    BLT.from_pretrained(changed)
    assert generate.main(["--model", str(changed), "--prompt", "x"]) == 2
    assert "is not the one that was exported" in capsys.readouterr().err
    arguments = ["--model", str(changed), "--entropy-out", str(tmp_path / "e"), "--out", str(tmp_path / "b")]
    assert convert_from_hf.main(arguments) == 2
    assert not (tmp_path / "b").exists()
    # Another threshold says that other patches are meant; or the original is named.
    load_for_inference(changed, threshold=2.0)
    assert load_for_inference(changed, entropy=sound / "entropy").entropy_model is not None


def test_the_named_entropy_model_is_the_exported_one(sound, tmp_path):
    """Where the directory says which it was, another that is named is refused too."""
    another = another_model()
    another.save_pretrained(tmp_path / "another")
    with pytest.raises(CheckpointError, match="is not the entropy model"):
        load_for_inference(sound / "hf", entropy=tmp_path / "another")
    load_for_inference(sound / "hf", entropy=tmp_path / "another", threshold=2.0)


def test_entropy_models_alone_are_checked(tmp_path):
    model = entropy_model()
    model.save_pretrained(tmp_path / "rounded", dtype=torch.bfloat16)
    EntropyModel.from_pretrained(tmp_path / "rounded")
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(CheckpointError, match="is not the one that was exported"):
        EntropyModel.from_pretrained(resave(tmp_path / "alone", tmp_path / "changed", torch.bfloat16))
    # How weights were drawn is not in the configuration, and is no change.
    random_blt().save_pretrained(tmp_path / "drawn", entropy_model=entropy_model(init_depth_scaling="total"), rule=RULE)
    assert np.isfinite(Patcher.from_pretrained(tmp_path / "drawn").patch_lengths("text")).all()


def test_directories_from_before_fingerprints_load(sound, tmp_path):
    shutil.copytree(sound / "hf", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["blt_titan"]["entropy_model"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert Pretrained(tmp_path / "old").rule == RULE
    Patcher.from_pretrained(tmp_path / "old")
