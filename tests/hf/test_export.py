"""Checkpoints of any layout out to `transformers`, and back into a run of any layout."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blt_titan import BLT, ByteTokenizer, Patcher
from blt_titan.checkpoint.load import describe_model
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.commands import export as convert_to_hf
from blt_titan.commands import import_ as convert_from_hf
from blt_titan.data.store.sidecars import fingerprint_of
from blt_titan.hf import export as export_module
from blt_titan.hf import tensors as tensors_module
from blt_titan.hf.config import HFConfigError
from blt_titan.hf.export import export_hf, stored_weights
from blt_titan.hf.load import load_for_inference
from blt_titan.hf.model_card import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from blt_titan.hf.tensors import StoredTensors
from blt_titan.hf.verify.verify import VerificationError, verify_export
from blt_titan.patching.rounding import UINT8_EDGES_NATS, decision_edge, from_storage, to_storage
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.score_data import sidecar_settings
from tests.helpers.distributed import run_distributed
from tests.helpers.hf_models import ARGS, RULE, another_model, entropy_model, random_blt, write_checkpoints
from tests.helpers.layouts import Layout
from tests.helpers.training_runs import gather_parameters, make_trainer

transformers = pytest.importorskip("transformers", reason="install the dev extra to compare with transformers")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A BLT and its entropy model as training checkpoints, `blt` and `entropy`."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000], ids=["one file", "several"])
def test_transformers_computes_the_same(checkpoints, tmp_path, dtype, max_shard_bytes):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy, dtype=dtype, max_shard_bytes=max_shard_bytes)
    found = verify_export(out, blt, entropy)
    assert found.boundaries > 50
    assert found.own_patches
    files = [load_file(path) for path in out.glob("*.safetensors")]
    assert (len(files) > 5) == (max_shard_bytes < 10**6)
    for file in files:
        assert len(file) == 1 or sum(tensor.nbytes for tensor in file.values()) <= max_shard_bytes
    assert BLT.from_pretrained(out).rule == RULE
    text = "Größe, 日本語 and </s> as text"
    ids = transformers.AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")
    assert ids["input_ids"][0].tolist() == ByteTokenizer().encode(text)
    generated = transformers.AutoModelForCausalLM.from_pretrained(out).generate(**ids, max_new_tokens=3)
    assert generated.shape[1] <= ids["input_ids"].shape[1] + 3


def test_there_and_back_is_bit_identical(checkpoints, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        first, again = tmp_path / f"first {dtype}", tmp_path / f"again {dtype}"
        entropy = stored_weights(checkpoints / "entropy")
        export_hf(stored_weights(checkpoints / "blt"), first, entropy=entropy, dtype=dtype)
        back = tmp_path / f"back {dtype}"
        assert convert_from_hf.main(["--model", str(first), "--out", f"{back}/b", "--entropy-out", f"{back}/e"]) == 0
        export_hf(stored_weights(back / "b"), again, entropy=stored_weights(back / "e"), dtype=dtype)
        for path in first.iterdir():
            assert path.name == "README.md" or (again / path.name).read_bytes() == path.read_bytes(), path.name
    model, original = BLT.from_pretrained(tmp_path / "first torch.float32"), random_blt()
    assert model.args == original.args
    for name, parameter in original.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


LAYOUTS = {
    "cp2tp2": Layout(cp=2, tp=2),
    "dp2pp2": Layout(dp_shard=2, pp=2),
    "fsdp_tables": Layout(dp_replicate=2, dp_shard=2, hash_sharding="fsdp"),
}


def save_layouts(out: str, overrides: list[str]) -> list[dict[str, torch.Tensor]]:
    """Save a checkpoint of each layout; return this rank's parameters, whole."""
    parameters = []
    for name, layout in LAYOUTS.items():
        settings = [*overrides, *layout.overrides, "--training.steps=1", "--checkpoint.interval=1"]
        trainer = make_trainer(f"{out}/{name}", "--data.streams=8", "--training.global_batch_size=8", *settings)
        trainer.train()
        parameters.append(gather_parameters(trainer))
        trainer.close()
        torch.distributed.barrier()
    return parameters


def begin_from(out: str, overrides: list[str], checkpoint: str) -> list[dict[str, torch.Tensor]]:
    """Load a checkpoint of weights into each layout, and train a step; return this rank's loaded parameters, whole."""
    parameters = []
    for name, layout in LAYOUTS.items():
        settings = [*overrides, *layout.overrides, f"--checkpoint.initial_load_path={checkpoint}", "--debug.seed=77"]
        settings += ["--training.steps=1"]
        trainer = make_trainer(f"{out}/{name}", "--data.streams=8", "--training.global_batch_size=8", *settings)
        trainer.checkpointer.load()
        parameters.append(gather_parameters(trainer))
        trainer.train()
        trainer.close()
        torch.distributed.barrier()
    return parameters


@pytest.mark.slow
def test_any_layout_out_and_back_in(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "_BLOCK_BYTES", 5_000)
    saved = run_distributed(save_layouts, 4, str(tmp_path / "out"), small_run, timeout_s=600)
    for number, name in enumerate(LAYOUTS):
        whole = {name: p for of_rank in saved for name, p in of_rank[number].items()}
        weights = stored_weights(tmp_path / "out" / name)
        assert weights.rule == PatchRule("space", max_patch_bytes=32)
        chunks = len(weights.tensors._tensors["hash_embedding.weight"].chunks)  # pyright: ignore[reportAttributeAccessIssue]
        assert chunks == {"cp2tp2": 4, "dp2pp2": 2, "fsdp_tables": 2}[name]
        hf = export_hf(weights, tmp_path / "hf" / name, force=True)
        model = BLT.from_pretrained(hf)
        assert whole.keys() == dict(model.named_parameters()).keys()
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, whole[key]), f"{name}: {key}"
    assert verify_export(hf, weights, None).tensors == len(whole)

    assert convert_from_hf.main(["--model", str(hf), "--out", str(tmp_path / "checkpoint")]) == 0
    begun = run_distributed(begin_from, 4, str(tmp_path / "in"), small_run, str(tmp_path / "checkpoint"), timeout_s=600)
    for number, name in enumerate(LAYOUTS):
        loaded = {name: p for of_rank in begun for name, p in of_rank[number].items()}
        assert loaded.keys() == whole.keys()
        for key, parameter in loaded.items():
            assert torch.equal(parameter, whole[key]), f"{name}: {key}"
    losses = [first_loss(tmp_path / "in" / name) for name in LAYOUTS]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    # The rows of the first step, by the model that was saved after it: seed 77 would give more than it began with.
    assert losses[0] < first_loss(tmp_path / "out" / "cp2tp2")


def first_loss(folder: Path) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line["loss_nats"] for line in lines if "loss_nats" in line)


def test_decision_edges():
    assert decision_edge(RULE.threshold) == (RULE.threshold, RULE.threshold)
    low, high = decision_edge(1.335442066192627)
    for value in (low - 1e-7, high + 1e-7):
        assert (np.float16(value) > 1.335442066192627) == (value > 1.335442066192627)
    assert 0 < high - low < 2**-10
    values = np.random.default_rng(0).uniform(0, 7, 10_000)
    for threshold in (0.0, 1e-4, 0.5, 1.335442066192627, float(UINT8_EDGES_NATS[200]), 6.0, 6.05, 7.0):
        low, high = decision_edge(threshold, "uint8")
        near = np.array([low - 1e-5, high + 1e-5])
        outside = np.concatenate([values[(values < low) | (values > high)], near[(near > 0) & np.isfinite(near)]])
        decided = from_storage(to_storage(outside, "uint8")) > np.float32(threshold)
        np.testing.assert_array_equal(decided, outside > threshold, err_msg=f"threshold {threshold}: {low} to {high}")
        assert high - low < 0.04 * max(threshold, 0.1) or (high == float("inf") and threshold > 6.06)
    assert decision_edge(float(UINT8_EDGES_NATS[200]), "uint8") == (UINT8_EDGES_NATS[200], UINT8_EDGES_NATS[200])


def test_entropies_of_8_bits_go_along(checkpoints, tmp_path):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    rule = PatchRule("global", threshold=float(UINT8_EDGES_NATS[200]), max_patch_bytes=512, storage="uint8")
    out = export_hf(replace(blt, rule=rule), tmp_path / "hf", entropy=entropy)
    assert verify_export(out, replace(blt, rule=rule), entropy).own_patches
    assert BLT.from_pretrained(out).rule == rule
    assert "rounded to uint8 in training" in (out / "README.md").read_text()


def test_what_transformers_cannot_cut_is_refused_and_can_be_forced(checkpoints, tmp_path, capsys):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    forgetful = replace(entropy, args=replace(entropy.args, reset_at_newline=True))
    for rule, of_entropy, reason in (
        (PatchRule("monotonic", threshold=0.2, max_patch_bytes=512), entropy, "patching.rule = 'monotonic'"),
        (PatchRule("add", threshold=1.0, threshold_add=0.2), entropy, "patching.rule = 'add'"),
        (PatchRule("space"), None, "patching.rule = 'space'"),
        (PatchRule("static", stride=4), None, "patching.rule = 'static'"),
        (replace(RULE, max_patch_bytes=255), entropy, "patching.max_patch_bytes = 255"),
        (RULE, None, "there is no entropy model"),
        (RULE, forgetful, "reset_at_newline"),
    ):
        with pytest.raises(HFConfigError, match=reason):
            export_hf(blt, tmp_path / "refused", entropy=of_entropy, rule=rule)
        out = export_hf(blt, tmp_path / "forced", entropy=of_entropy, rule=rule, force=True, overwrite=True)
        card = (out / "README.md").read_text()
        assert reason.removeprefix("there is ") in card
        assert "patch_lengths" in card
        assert not json.loads((out / "config.json").read_text())["patch_in_forward"]
        verify_export(out, replace(blt, rule=rule), None)
        if rule.by_entropy:
            assert "--entropy-checkpoint ENTROPY_MODEL" in card
        else:
            assert Patcher.from_pretrained(out).patch_lengths("some text") == Patcher(rule).patch_lengths("some text")
        assert load_for_inference(out, entropy=checkpoints / "entropy").rule == rule
    assert not (tmp_path / "refused").exists()
    arguments = ["--checkpoint", str(checkpoints / "blt"), "--out", str(tmp_path / "forced")]
    assert convert_to_hf.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert convert_to_hf.main([*arguments, "--overwrite"]) == 2
    assert "there is no entropy model" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="is not a model directory"):
        export_hf(blt, tmp_path / "mine", force=True, overwrite=True)


def test_the_command_verifies(checkpoints, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoints / "blt"), "--entropy-checkpoint", str(checkpoints / "entropy")]
    out = tmp_path / "hf"
    (tmp_path / "patch_lengths.json").write_text('{"cut_share": 0.00025, "counts": []}')
    arguments += ["--out", str(out), "--patch-lengths", str(tmp_path / "patch_lengths.json")]
    assert convert_to_hf.main([*arguments, "--dtype", "bf16", "--threshold", "2.5", "--verify"]) == 0
    assert "verified: " in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["patching_threshold"], config["use_cache"]) == ("bfloat16", 2.5, False)
    card = (out / "README.md").read_text()
    assert (
        f"Tested with {OLDEST_TRANSFORMERS}, the oldest that can express the model, and {NEWEST_TRANSFORMERS}" in card
    )
    assert "0.025% of the training text's patches" in card
    lengths = Patcher.from_pretrained(out).patch_lengths("some text, and more")
    assert lengths[0] == 1
    assert sum(lengths) == len("some text, and more") + 2


@pytest.mark.parametrize("content", ["[1]", "{}", '{"cut_share": "x"}', '{"cut_share": NaN}', "[" * 100_000])
def test_damaged_patch_lengths_are_named(checkpoints, tmp_path, capsys, content):
    (tmp_path / "lengths.json").write_text(content)
    arguments = ["--checkpoint", str(checkpoints / "blt"), "--out", str(tmp_path / "hf"), "--force"]
    assert convert_to_hf.main([*arguments, "--patch-lengths", str(tmp_path / "lengths.json")]) == 2
    assert capsys.readouterr().err.startswith(f"blt-titan export: error: --patch-lengths {tmp_path / 'lengths.json'}: ")


def test_checkpoints_that_do_not_fit_are_named(checkpoints, tmp_path):
    blt = stored_weights(checkpoints / "blt")
    with pytest.raises(CheckpointError, match="missing tensors"):
        export_hf(replace(blt, args=replace(ARGS, decoder_layers=3)), tmp_path / "x", force=True)
    with pytest.raises(CheckpointError, match="left over"):
        export_hf(replace(blt, args=replace(ARGS, decoder_layers=1)), tmp_path / "x", force=True)
    with pytest.raises(CheckpointError, match="of other shapes"):
        export_hf(replace(blt, args=replace(ARGS, hash_rows=100)), tmp_path / "x", force=True)
    assert not list(tmp_path.iterdir())
    shutil.copytree(checkpoints / "blt", tmp_path / "short")
    [data] = (tmp_path / "short").glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read|cut short"):
        export_hf(stored_weights(tmp_path / "short"), tmp_path / "x", force=True)


def test_an_export_reads_in_blocks(checkpoints, tmp_path, monkeypatch):
    most, rows, read = 5_000, StoredTensors.rows, []

    def watched(self, name: str, begin: int, end: int) -> torch.Tensor:
        read.append(rows(self, name, begin, end))
        assert read[-1].nbytes <= most or len(read[-1]) == 1, f"{name}: {read[-1].nbytes} bytes at once"
        return read[-1]

    monkeypatch.setattr(tensors_module, "_BLOCK_BYTES", most)
    monkeypatch.setattr(StoredTensors, "rows", watched)
    monkeypatch.setattr(StoredTensors, "whole", None)
    entropy = stored_weights(checkpoints / "entropy")
    export_hf(stored_weights(checkpoints / "blt"), tmp_path / "hf", entropy=entropy)
    assert len(read) > 50


def test_rows_of_a_stored_tensor(checkpoints):
    stored, model = StoredTensors(checkpoints / "blt"), random_blt()
    table = model.hash_embedding.weight
    assert torch.equal(stored.rows("hash_embedding.weight", 100, 305), table[100:305])
    assert torch.equal(stored.rows("decoder.norm.weight", 3, 4), model.decoder.norm.weight[3:4])
    assert describe_model(checkpoints / "blt").rule.threshold == RULE.threshold


def test_files_of_others_stay(checkpoints, tmp_path, monkeypatch):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy, max_shard_bytes=30_000)
    (out / "notes.txt").write_text("mine")
    (out / ".git").mkdir()
    export_hf(blt, out, entropy=entropy, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / ".git").is_dir()
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    verify_export(out, blt, entropy)

    # One that appears while weights are written is nobody's to replace.
    def meanwhile(*args, **kwargs):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "thesis.txt").write_text("x")

    monkeypatch.setattr(export_module, "write_safetensors", meanwhile)
    with pytest.raises(FileExistsError, match="is there already"):
        export_hf(blt, tmp_path / "late", entropy=entropy)
    assert (tmp_path / "late" / "thesis.txt").read_text() == "x"
    with pytest.raises(FileExistsError, match="is there already"):
        export_hf(blt, tmp_path / "nothing" / "..", entropy=entropy)


def test_a_directory_is_the_old_model_or_the_new_one_or_none(checkpoints, tmp_path, monkeypatch):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy)
    other, replace_file = replace(blt, rule=replace(RULE, threshold=2.0)), os.replace

    def until_the_configuration(source, target):
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(export_module.os, "replace", until_the_configuration)
    with pytest.raises(KeyboardInterrupt):
        export_hf(other, out, entropy=entropy, overwrite=True)
    monkeypatch.setattr(export_module.os, "replace", replace_file)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        BLT.from_pretrained(out)
    export_hf(other, out, entropy=entropy, overwrite=True)
    assert BLT.from_pretrained(out).rule == other.rule
    assert not [path for path in out.iterdir() if path.name.startswith(".")]

    (out / "config.json").write_text('{"model_type": "llama"}')
    for model in (random_blt(), entropy_model()):
        with pytest.raises(FileExistsError, match="another"):
            model.save_pretrained(out)
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("limit", [256, 300, None])
def test_the_limit_of_patches_goes_along(checkpoints, tmp_path, limit):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    rule = replace(RULE, threshold=9.0, max_patch_bytes=limit)
    out = export_hf(replace(blt, rule=rule), tmp_path / "hf", entropy=entropy)
    verify_export(out, replace(blt, rule=rule), entropy)
    assert Patcher.from_pretrained(out).patch_lengths("a" * 600) == Patcher(rule, entropy_model()).patch_lengths(
        "a" * 600
    )
    with pytest.raises(VerificationError, match="patching max_patch_bytes is"):
        verify_export(out, replace(blt, rule=replace(rule, max_patch_bytes=400)), entropy)
    # Who sets another threshold sets it where transformers reads it.
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"patching_threshold": 1.5}))
    assert BLT.from_pretrained(out).rule == replace(rule, threshold=1.5)


def test_the_patcher_is_not_rounded(checkpoints, tmp_path):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    out = export_hf(blt, tmp_path / "hf", entropy=entropy, dtype=torch.bfloat16)
    dtypes = {name.startswith("model.patcher."): t.dtype for name, t in load_file(out / "model.safetensors").items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert Patcher.from_pretrained(out).patch_lengths("x" * 50) == Patcher(RULE, entropy_model()).patch_lengths(
        "x" * 50
    )


def test_swapped_and_other_models_are_named(checkpoints, tmp_path):
    blt, entropy = stored_weights(checkpoints / "blt"), stored_weights(checkpoints / "entropy")
    with pytest.raises(CheckpointError, match="holds a BLT, where an entropy model is wanted"):
        export_hf(blt, tmp_path / "x", entropy=blt)
    with pytest.raises(CheckpointError, match="holds an entropy model, where a BLT is wanted"):
        export_hf(entropy, tmp_path / "x", entropy=entropy)
    with pytest.raises(HFConfigError, match=r"patching\.threshold = nan"):
        export_hf(blt, tmp_path / "x", entropy=entropy, rule=replace(RULE, threshold=float("nan")))
    # A checkpoint that knows which entropies its text was cut by takes no others.
    own = fingerprint_of(sidecar_settings(entropy_model(), "float16", "float32"))
    coarse = fingerprint_of(sidecar_settings(entropy_model(), "uint8", "float32"))
    with pytest.raises(CheckpointError, match="rounded to uint8, but the rule says float16"):
        export_hf(replace(blt, entropies=coarse), tmp_path / "x", entropy=entropy)
    export_hf(replace(blt, entropies=own), tmp_path / "own", entropy=entropy)
    other = fingerprint_of(sidecar_settings(entropy_model(init_seed=5, reset_at_newline=True), "float16", "float32"))
    with pytest.raises(CheckpointError, match="is not the entropy model by which"):
        export_hf(replace(blt, entropies=other), tmp_path / "x", entropy=entropy)
    assert not (tmp_path / "x").exists()
    # Directories know it, too; another threshold says that other patches are meant.
    write_checkpoint(entropy_model(), "blt_entropy", entropy_model().args, tmp_path / "own_entropy")
    another = another_model()
    write_checkpoint(another, "blt_entropy", another.args, tmp_path / "another")
    load_for_inference(tmp_path / "own", entropy=tmp_path / "own_entropy")
    model = BLT.from_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match="is not the entropy model by which"):
        model.save_pretrained(tmp_path / "x", entropy_model=another_model())
    model.save_pretrained(tmp_path / "again", entropy_model=entropy_model())
    assert BLT.from_pretrained(tmp_path / "again").entropies == own
    for threshold in (None, RULE.threshold):
        with pytest.raises(CheckpointError, match="is not the entropy model by which"):
            load_for_inference(tmp_path / "own", entropy=tmp_path / "another", threshold=threshold)
    load_for_inference(tmp_path / "own", entropy=tmp_path / "another", threshold=2.0)
    assert convert_from_hf.main(["--model", str(tmp_path / "own"), "--out", str(tmp_path / "back")]) == 0
    assert stored_weights(tmp_path / "back").entropies == own
