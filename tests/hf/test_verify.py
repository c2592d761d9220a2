"""Verification of an export: what it lets pass, and that each of its comparisons can fail."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_titan import ByteTokenizer
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.hf.config import HFConfigError
from blt_titan.hf.export import Weights, export_hf, stored_weights
from blt_titan.hf.pretrained import Pretrained
from blt_titan.hf.tensors import ModuleTensors, StoredTensors
from blt_titan.hf.verify import verify as verify_module
from blt_titan.hf.verify.verify import FLOAT64_RTOL, VerificationError, longer_than_windows, verify_export
from tests.helpers.hf_models import ARGS, RULE, entropy_model, random_blt, write_checkpoints
from tests.helpers.transformers_order import LOGITS_ATOL, compare_fp32

pytest.importorskip("transformers", reason="install the dev extra to compare with transformers")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A BLT and its entropy model as training checkpoints, `blt` and `entropy`."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_what_differs_is_found(checkpoints, tmp_path):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy)
    path = out / "model.safetensors"
    tensors = load_file(path)
    for name in ("lm_head.weight", "model.encoder_hash_tok_embedding.weight", "model.patcher.norm.weight"):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name].view(-1)[-1] += 0.01
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(VerificationError, match=f"{name} is not what"):
            verify_export(out, blt, entropy)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    other_norm = config | {"global_config": config["global_config"] | {"rms_norm_eps": 1e-2}}
    (out / "config.json").write_text(json.dumps(other_norm))
    with pytest.raises(HFConfigError, match="rms_norm_eps"):
        verify_export(out, blt, entropy)
    for changes, message in (
        ({"local_attention_window_len": 41}, "local_window is 41, the checkpoint's 40"),
        ({"patching_threshold": 1.25}, "patching threshold is 1.25"),
        (
            {"patcher_config": config["patcher_config"] | {"sliding_window": None}},
            "entropy model window is 8192, the checkpoint's 24",
        ),
    ):
        (out / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(VerificationError, match=message):
            verify_export(out, blt, entropy)


def test_fp64_finds_what_fp32_rounding_hides(checkpoints, tmp_path, monkeypatch):
    from transformers.models.blt.modeling_blt import BltRMSNorm

    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy)
    assert verify_export(out, blt, entropy).float64_error < FLOAT64_RTOL / 100
    init = BltRMSNorm.__init__
    monkeypatch.setattr(BltRMSNorm, "__init__", lambda self, width, eps: init(self, width, eps * 1.001))
    with pytest.raises(VerificationError, match="computed in fp64 differ by"):
        verify_export(out, blt, entropy)
    monkeypatch.setattr(verify_module, "FLOAT64_RTOL", 1.0)
    verify_export(out, blt, entropy)  # Comparing in fp32 alone would have let it through.


def test_weights_that_amplify_rounding(tmp_path, monkeypatch):
    from transformers.models.blt.modeling_blt import BltCrossAttention

    model, of_entropies = random_blt(), entropy_model()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *of_entropies.named_parameters()]:
            if "embedding" not in name and "norm" not in name:
                parameter.mul_(2.0)
    write_checkpoint(model, "blt", ARGS, tmp_path / "blt", rule=RULE)
    write_checkpoint(of_entropies, "blt_entropy", of_entropies.args, tmp_path / "entropy")
    blt, entropy = stored_weights(tmp_path / "blt"), stored_weights(tmp_path / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy)
    verified = verify_export(out, blt, entropy)
    assert verified.own_patches
    # Of one order of operations no difference is left, of two orders more than a flat tolerance would allow.
    found = compare_fp32(out)
    assert found.same_order_error < LOGITS_ATOL / 10
    assert found.own_order_error > LOGITS_ATOL
    assert found.own_order_error == verified.float32_error
    init = BltCrossAttention.__init__

    def scaled_otherwise(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        self.scaling *= 1.001

    monkeypatch.setattr(BltCrossAttention, "__init__", scaled_otherwise)
    with pytest.raises(AssertionError, match="though both compute in one order"):
        compare_fp32(out)


@pytest.mark.parametrize(
    ("module", "step", "in_entropies"),
    [
        ("torch.nn.functional", "embedding_bag", False),
        ("blt_titan.model.cross_attention", "gather_attention", False),
        ("blt_titan.model.cross_attention", "segment_attention", False),
        ("blt_titan.model.attention", "attend_in_blocks", True),
        ("blt_titan.model.layers", "rotate", True),
    ],
)
def test_coarse_arithmetic_of_ours_is_found(checkpoints, tmp_path, monkeypatch, module, step, in_entropies):
    exact = getattr(sys.modules[module], step)

    def coarse(*args, **kwargs) -> torch.Tensor:
        result = exact(*args, **kwargs)
        if result.dtype != torch.float32:
            return result
        mantissa, exponent = torch.frexp(result)
        return torch.ldexp((mantissa * 2**12).round() / 2**12, exponent)

    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy)
    monkeypatch.setattr(sys.modules[module], step, coarse)
    if in_entropies:
        with pytest.raises(VerificationError, match="entropies differ"):
            verify_export(out, blt, entropy)
    else:
        with pytest.raises(AssertionError, match="our logits in fp32 are"):
            compare_fp32(out)


def test_an_older_transformers_is_refused(checkpoints, tmp_path, monkeypatch):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.22.2")
    with pytest.raises(VerificationError, match=r"transformers 5\.22\.2 attends without a window"):
        verify_export(out, blt, entropy)


def test_what_the_export_reads_wrongly_is_found(checkpoints, tmp_path, monkeypatch):
    rows = StoredTensors.rows
    monkeypatch.setattr(
        StoredTensors,
        "rows",
        lambda self, name, *at: rows(self, name, *at).flip(-1) if ".wk." in name else rows(self, name, *at),
    )
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy)
    with pytest.raises(VerificationError, match=r"k_proj\.weight is not what"):
        verify_export(out, blt, entropy)


def test_the_text_is_longer_than_the_windows(tmp_path):
    export_hf(
        Weights(replace(ARGS, local_window=1024), ModuleTensors(random_blt())), tmp_path, force=True, overwrite=True
    )
    assert len(ByteTokenizer().encode(longer_than_windows(Pretrained(tmp_path)))) > 1024
