"""Released weights: the layout of `transformers` in one file or several, and that of the original project."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_titan import BLT, EntropyModel, Patcher
from blt_titan.commands import import_ as convert_from_hf
from blt_titan.hf import directory as directory_module
from blt_titan.hf.config import HFConfigError
from blt_titan.hf.export import stored_weights
from blt_titan.hf.pretrained import Pretrained
from blt_titan.hf.tensors import StoredTensors
from blt_titan.patching.rule import PatchRule
from tests.helpers.hf_models import RULE, entropy_model, random_blt
from tests.helpers.original_weights import write_original


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert found.args == expected.args
    parameters = dict(expected.named_parameters())
    assert parameters.keys() == dict(found.named_parameters()).keys()
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


BLOCK = [f"attention.w{x}" for x in "qkvo"] + [f"feed_forward.w{i}" for i in (1, 2, 3)] + ["attention_norm", "ffn_norm"]
CROSS = ["cross_attn_norm_q", "cross_attn_norm_kv", "wq", "wk", "wv", "wo"]
BLOCKS = [
    "local_encoder.layers.0",
    *(f"{stack}.layers.{i}" for stack in ("global_transformer", "local_decoder") for i in (0, 1)),
]
CROSSES = [
    "local_encoder.cross_attn_layers.0",
    "local_decoder.cross_attn_layers.0",
    "local_decoder.cross_attn_layers.1",
]
ORIGINAL_NAMES = {
    *(f"{block}.{part}.weight" for block in BLOCKS for part in BLOCK),
    *(f"{cross}.{part}.weight" for cross in CROSSES for part in CROSS),
    *(f"encoder_hash_tok_embedding.{table}.weight" for table in range(6)),
    "local_encoder.tok_embeddings.weight",
    "local_encoder.patch_embedding_projection.weight",
    "global_transformer.token_embedding_projection.weight",
    "local_decoder.patch_embedding_projection.weight",
    "local_decoder.norm.weight",
    "local_decoder.output.weight",
}
"""Written down apart from the code that translates."""


def test_names_of_the_original_layout(tmp_path):
    model, entropy = write_original(tmp_path / "released")
    tensors = load_file(tmp_path / "released" / "model.safetensors")
    assert tensors.keys() == ORIGINAL_NAMES
    for name, parameter in (
        ("local_encoder.cross_attn_layers.0.cross_attn_norm_q", model.encoder.cross_attention[0].q_norm),
        ("local_decoder.cross_attn_layers.1.cross_attn_norm_kv", model.decoder.cross_attention[1].kv_norm),
        ("local_decoder.layers.1.feed_forward.w3", model.decoder.layers["1"].feed_forward.w3),
        ("global_transformer.layers.1.attention_norm", model.layers["1"].attention_norm),
        ("local_encoder.layers.0.ffn_norm", model.encoder.layers["0"].ffn_norm),
    ):
        assert torch.equal(tensors[f"{name}.weight"], parameter.weight), name
    names = {f"layers.{i}.{part}.weight" for i in range(3) for part in BLOCK}
    assert dict(entropy.named_parameters()).keys() == names | {"tok_embeddings.weight", "norm.weight", "output.weight"}


def test_the_command_converts_the_original_layout(tmp_path):
    model, entropy = write_original(tmp_path / "released")
    command = ["--model", str(tmp_path / "released"), "--out", str(tmp_path / "blt")]
    assert convert_from_hf.main([*command, "--entropy-out", str(tmp_path / "entropy")]) == 0
    for name, of in (("blt", model), ("entropy", entropy)):
        stored = StoredTensors(tmp_path / name)
        for key, parameter in of.named_parameters():
            assert torch.equal(stored.whole(key), parameter), key
    assert stored_weights(tmp_path / "blt").rule == RULE


def test_the_original_layout(tmp_path):
    model, entropy = write_original(tmp_path / "released")
    assert_same(BLT.from_pretrained(tmp_path / "released"), model)
    assert_same(EntropyModel.from_pretrained(tmp_path / "released"), entropy)
    assert Patcher.from_pretrained(tmp_path / "released").rule == RULE
    # `facebook/blt-entropy` is such a folder alone.
    assert_same(EntropyModel.from_pretrained(tmp_path / "released" / "entropy_model"), entropy)
    with pytest.raises(HFConfigError, match="holds an entropy model alone"):
        BLT.from_pretrained(tmp_path / "released" / "entropy_model")


def test_the_original_s_rules(tmp_path):
    write_original(tmp_path / "released")
    path = tmp_path / "released" / "entropy_model" / "params.json"
    params = json.loads(path.read_text())
    for changes, rule in (
        ({"monotonicity": True}, PatchRule("monotonic", threshold=RULE.threshold, max_patch_bytes=512)),
        ({"threshold_add": 0.5}, PatchRule("add", threshold=RULE.threshold, threshold_add=0.5, max_patch_bytes=512)),
        ({"threshold": 0.0}, PatchRule("global", threshold=0.0, max_patch_bytes=512)),
        ({"threshold_add": 0.0}, PatchRule("add", threshold=RULE.threshold, threshold_add=0.0, max_patch_bytes=512)),
        ({"max_patch_length": 64}, PatchRule("global", threshold=RULE.threshold, max_patch_bytes=64)),
    ):
        arguments = params["data"]["patcher_args"] | changes
        path.write_text(json.dumps(params | {"data": {"patcher_args": arguments}}))
        assert Pretrained(tmp_path / "released").rule == rule


def test_another_patching_mode_is_refused(tmp_path):
    write_original(tmp_path / "released")
    path = tmp_path / "released" / "entropy_model" / "params.json"
    path.write_text(path.read_text().replace('"monotonicity"', '"patching_mode": "space", "monotonicity"'))
    with pytest.raises(HFConfigError, match="patching_mode = 'space'"):
        _ = Pretrained(tmp_path / "released").rule


def test_a_window_that_is_missing_is_the_released_one(tmp_path):
    """As in transformers; null is none."""
    random_blt().save_pretrained(tmp_path, entropy_model=entropy_model(), rule=RULE)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["local_attention_window_len"], config["patcher_config"]["sliding_window"]
    path.write_text(json.dumps(config))
    assert Pretrained(tmp_path).blt_args.local_window == 512
    assert Pretrained(tmp_path).entropy_args.window == 512
    config["local_attention_window_len"] = config["patcher_config"]["sliding_window"] = None
    path.write_text(json.dumps(config))
    assert Pretrained(tmp_path).blt_args.local_window == 24576
    assert Pretrained(tmp_path).entropy_args.window == 8192


def test_damaged_files_are_named(tmp_path):
    random_blt().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read as safetensors"):
        BLT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        BLT.from_pretrained(tmp_path)
    write_original(tmp_path / "released")
    (tmp_path / "released" / "entropy_model" / "consolidated.pth").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"consolidated\.pth: cannot be read"):
        EntropyModel.from_pretrained(tmp_path / "released")


def test_an_original_that_does_not_fit_is_refused(tmp_path):
    write_original(tmp_path / "tables", rows_of_tables=100)
    with pytest.raises(ValueError, match="hash tables"):
        BLT.from_pretrained(tmp_path / "tables")
    write_original(tmp_path / "released")
    path = tmp_path / "released" / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"dim_local_decoder": 64}, "dim_local_encoder and dim_local_decoder differ"),
        ({"cross_attn_k": None}, "args.cross_attn_k is missing"),
        ({"norm_eps": 1e-6}, "args.norm_eps = 1e-06"),
        ({"downsampling_by_pooling": "mean"}, "args.downsampling_by_pooling = 'mean', must be 'max'"),
        ({"cross_attn_init_by_pooling": False}, "args.cross_attn_init_by_pooling = False"),
        ({"use_rope": False}, "args.use_rope = False"),
        ({"tie_local_encoder_decoder": True}, "args.tie_local_encoder_decoder = True"),
        ({"n_layers_global": 3}, "missing tensors"),
        ({"n_layers_global": 1}, "left over"),
    ):
        path.write_text(json.dumps({"args": config["args"] | changes}))
        with pytest.raises(ValueError, match=message):
            BLT.from_pretrained(tmp_path / "released")


def test_saved_models_come_back(tmp_path):
    model, entropy = random_blt(), entropy_model()
    model.save_pretrained(tmp_path / "blt", entropy_model=entropy, rule=RULE)
    entropy.save_pretrained(tmp_path / "entropy")
    assert_same(BLT.from_pretrained(tmp_path / "blt"), model)
    for folder in ("blt", "entropy"):
        assert_same(EntropyModel.from_pretrained(tmp_path / folder), entropy)
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="holds no entropy model"):
        EntropyModel.from_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="says no rule"):
        Patcher.from_pretrained(tmp_path / "alone")
    with pytest.raises(FileExistsError, match="holds a model of another kind"):
        entropy.save_pretrained(tmp_path / "blt")
    other = entropy_model()
    other.output.weight.data *= 2
    (tmp_path / "entropy" / "model.safetensors.index.json").write_text("{}")
    other.save_pretrained(tmp_path / "entropy")
    assert_same(EntropyModel.from_pretrained(tmp_path / "entropy"), other)
    forgetful = entropy_model(reset_at_newline=True)
    forgetful.save_pretrained(tmp_path / "newline")
    assert_same(EntropyModel.from_pretrained(tmp_path / "newline"), forgetful)


def test_shards_that_are_missing_are_named(tmp_path):
    random_blt().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    half = sorted(tensors)[: len(tensors) // 2]
    weight_map = {name: f"model-{1 if name in half else 2}.safetensors" for name in tensors}
    for number in (1, 2):
        save_file(
            {n: t for n, t in tensors.items() if (n in half) == (number == 1)}, tmp_path / f"model-{number}.safetensors"
        )
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(BLT.from_pretrained(tmp_path), random_blt())
    wrong = weight_map | {half[0]: "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(ValueError, match="missing tensors"):
        BLT.from_pretrained(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors not found"):
        BLT.from_pretrained(tmp_path)


def test_a_repository_is_fetched(tmp_path, monkeypatch):
    """The hub itself cannot be reached from a test; what is asked of it can be seen."""
    model = random_blt()
    model.save_pretrained(tmp_path / "snapshot")
    asked = []

    def snapshot(name, *, revision, allow_patterns):
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(directory_module, "snapshot_download", snapshot)
    assert_same(BLT.from_pretrained("someone/blt", revision="abc"), model)
    assert asked == [("someone/blt", "abc")]
    with pytest.raises(FileNotFoundError, match="no such directory, and not the name of a repository"):
        BLT.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json not found"):
        BLT.from_pretrained(tmp_path)
