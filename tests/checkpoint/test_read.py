"""Checkpoints of strangers, and what a killed machine leaves."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan.checkpoint.description import MODEL_KEY, Description
from blt_titan.checkpoint.load import describe_model, fill_state, load_entropy_model
from blt_titan.checkpoint.read import CheckpointError, SafeLoadPlanner, SafeReader
from blt_titan.checkpoint.verify import damage
from blt_titan.model.args import EntropyModelArgs
from tests.helpers.attacks import Attack, pointers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE: dict[str, Any] = {
    "weight": torch.arange(5000.0),
    "half": torch.ones(3, 2, dtype=torch.bfloat16),
    "train_state": {"step": 7, "model": "{}", "ntokens_seen": 2**40},
    "dataloader": {"positions": np.arange(12).reshape(3, 4), "rows_served": 9, "identity": "x"},
    "lr_scheduler": {"last_epoch": 7, "_last_lr": [0.1], "_is_initial": False, "base_lrs": [0.1]},
    "optimizer": {"param_groups": {"w": {"betas": (0.9, 0.95), "amsgrad": False, "foreach": None, "lr": 1e-3}}},
}


def saved(folder: Path, state: dict[str, Any] = STATE) -> Path:
    save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def loaded(folder: Path) -> dict[str, Any]:
    state = {
        "weight": torch.zeros(5000),
        "half": torch.zeros(3, 2, dtype=torch.bfloat16),
        "train_state": {"step": 0, "model": "", "ntokens_seen": 0},
        "dataloader": {"positions": np.zeros(1), "rows_served": 0, "identity": ""},
        "lr_scheduler": {"last_epoch": 0, "_last_lr": [], "_is_initial": True, "base_lrs": []},
        "optimizer": {"param_groups": {"w": {"betas": (), "amsgrad": True, "foreach": True, "lr": 0.0}}},
    }
    load(state, storage_reader=SafeReader(folder), planner=SafeLoadPlanner(), no_dist=True)
    return state


def test_the_state_of_training_comes_back(tmp_path):
    assert damage(saved(tmp_path / "c")) is None
    found = loaded(tmp_path / "c")
    for name in ("train_state", "lr_scheduler", "optimizer"):
        assert found[name] == STATE[name]
    assert found["dataloader"].pop("positions").tolist() == np.arange(12).reshape(3, 4).tolist()
    assert torch.equal(found["weight"], STATE["weight"])
    assert torch.equal(found["half"], STATE["half"])


def test_damage_is_named(tmp_path):
    saved(tmp_path / "sound")
    data = next((tmp_path / "sound").glob("*.distcp"))
    content, metadata = data.read_bytes(), (tmp_path / "sound" / ".metadata").read_bytes()
    zeros, half = bytes(len(content)), len(content) // 2
    for number, (file, wrong, sentence) in enumerate(
        (
            (".metadata", None, "cannot be read"),
            (".metadata", b"", "is empty"),
            (".metadata", bytes(len(metadata)), "cannot be read"),
            (".metadata", metadata[:-20], "cannot be read"),
            (".metadata", pickle.dumps({"a": 1}), "is no checkpoint's metadata"),
            (data.name, None, "No such file"),
            (data.name, content[:-1], "is cut short"),
            (data.name, b"", "is cut short"),
            (data.name, zeros, "is damaged at byte 0"),
            (data.name, content[:half] + zeros[half:], "is damaged at byte"),
            (data.name, content[: len(content) - 4096] + bytes(4096), "is damaged at byte"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", folder)
        (folder / file).unlink() if wrong is None else (folder / file).write_bytes(wrong)
        found = damage(folder)
        assert found is not None, sentence
        assert found.startswith(f"{folder / file}: "), found
        assert sentence in found
    assert damage(tmp_path / "sound") is None


def change(folder: Path, how: Any) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    how(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_that_runs_code_is_refused(tmp_path):
    saved(tmp_path / "c")
    attack = Attack(tmp_path / "ran")
    for how in (
        lambda metadata: setattr(metadata, "planner_data", attack),
        lambda metadata: metadata.state_dict_metadata.update(more=attack),
        lambda metadata: metadata.storage_data.update({MetadataIndex("weight"): attack}),
    ):
        change(tmp_path / "c", how)
        assert "io.open, which no checkpoint's metadata needs" in str(damage(tmp_path / "c"))
        saved(tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(attack))
    with pytest.raises(CheckpointError, match=r"io\.open"):
        fill_state({"weight": torch.zeros(5000)}, tmp_path / "c")
    # torch looks for that of a rank where there is none of all.
    (tmp_path / "c" / ".metadata").rename(tmp_path / "c" / "__0.metadata")
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        fill_state({"weight": torch.zeros(5000)}, tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_metadata_cannot_change_its_classes(tmp_path):
    before = dict(vars(StorageMeta))
    # A class, then BUILD with (None, attributes), which sets them.
    state = pickle.dumps((None, {"load_id": "evil", "more": 1}), protocol=2)[2:-1]
    content = b"\x80\x04c" + Metadata.__module__.encode() + b"\nStorageMeta\n" + state + b"b."
    (tmp_path / ".metadata").write_bytes(content)
    assert pickle.loads(content).load_id == "evil"  # that it would
    StorageMeta.load_id = before["load_id"]
    del StorageMeta.more
    assert "is no checkpoint's metadata" in str(damage(tmp_path))
    assert dict(vars(StorageMeta)) == before


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (lambda m: place(m).__dict__.update(relative_path="../x"), "is not a file of this folder"),
        (lambda m: place(m).__dict__.update(relative_path="/etc/passwd"), "is not a file of this folder"),
        (lambda m: place(m).__dict__.update(relative_path=5), "is not a file of this folder"),
        (lambda m: place(m).__dict__.update(offset=-5), "lies nowhere"),
        (lambda m: place(m).__dict__.update(length=1.5), "lies nowhere"),
        (lambda m: place(m).__dict__.update(length=10**30), "lies nowhere"),
        (lambda m: m.storage_data.update(x=place(m)), "places an entry that it lacks"),
        (lambda m: setattr(m, "storage_data", [1]), "does not say what is stored"),
        (lambda m: m.state_dict_metadata.update(weight="x"), "is no tensor"),
        (lambda m: setattr(m.state_dict_metadata["weight"], "size", torch.Size([10**12])), "is no tensor"),
        (lambda m: setattr(m.state_dict_metadata["weight"], "chunks", []), "is no tensor"),
        (lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", "x"), "is no tensor"),
        (lambda m: setattr(m, "storage_meta", 5), "storage_meta"),
    ],
)
def test_lying_metadata_is_refused(tmp_path, how, sentence):
    change(saved(tmp_path), how)
    assert sentence in str(damage(tmp_path))


def place(metadata: Metadata) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "weight")


def test_a_tensor_larger_than_its_place_is_refused(tmp_path):
    def enlarge(metadata: Metadata) -> None:
        stored: Any = metadata.state_dict_metadata["weight"]
        stored.size = stored.chunks[0].sizes = torch.Size([10**12])

    change(saved(tmp_path), enlarge)
    assert "'weight' is larger than its place" in str(damage(tmp_path))


def test_an_entry_that_runs_code_is_refused(tmp_path):
    for name in ("weight", MODEL_KEY):
        folder = saved(tmp_path / name, {name: Attack(tmp_path / "ran")})
        (tmp_path / "ran").unlink(missing_ok=True)
        with pytest.raises(
            CheckpointError,
            match=rf"entry '{name}' is damaged, or holds other objects than plain data \(it names io.open",
        ):
            fill_state({name: ""}, folder)
        assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="holds other objects than plain data"):
        describe_model(folder)


def described(**changes) -> str:
    """A description of a small entropy model, with other fields or other arguments."""
    content = json.loads(Description("blt_entropy", EntropyModelArgs(dim=32, n_heads=2, n_layers=1)).to_json())
    fields = {key: changes.pop(key) for key in tuple(changes) if key in content}
    content["args"] |= changes
    return json.dumps(content | fields)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds an array, expected an object"),
        ("[" * 100_000, "is nested too deep"),
        ('{"name": "blt_entropy", "name": "blt"}', "holds 'name' twice"),
        (described(name="llama"), "holds a model 'llama'"),
        (described(args=[]), "args is no object"),
        (described(dim=2.5), "args.dim = 2.5, must be a whole number"),
        (described(n_layers=1000000000000), "args.n_layers = 1000000000000, must be"),
        (described(rope_theta=float("nan")), "holds NaN"),
        (described(dim=10, n_heads=3), "must be an even multiple"),
        (described(patching=5), "patching: holds 5, expected an object"),
        (described(patching={"rule": "x"}), "patching.rule = 'x', must be one of"),
        (described(patching={"rule": "static", "storage": "float16"}), "stride = None: .static. needs a stride"),
        (described(patching={"rule": "space"}), "patching.storage is missing"),
        (described(), "missing tensors"),
        (5, "holds int, expected a text"),
    ],
)
def test_what_a_checkpoint_says_is_checked(tmp_path, content, sentence):
    saved(tmp_path, {MODEL_KEY: content})
    with pytest.raises(CheckpointError, match=sentence):
        load_entropy_model(tmp_path)


READ = """
import sys
from pathlib import Path
from blt_titan.checkpoint.description import MODEL_KEY, Description
from blt_titan.checkpoint.load import fill_state
from blt_titan.checkpoint.read import CheckpointError
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        fill_state({MODEL_KEY: ""}, folder)
        print(f"{folder.name}: was read")
    except CheckpointError as error:
        print(f"{folder.name}: {'other objects' in str(error)}")
    sys.stdout.flush()
"""


def test_no_array_of_an_entry_is_followed_to_memory(tmp_path):
    """In a process of its own, which the numpy that believes such a file would end."""
    attacks = pointers()
    for name, attack in attacks.items():
        save({MODEL_KEY: attack, "weight": torch.ones(2)}, checkpoint_id=str(tmp_path / name), no_dist=True)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name}: True" for name in sorted(attacks)]


@pytest.mark.parametrize(
    "array",
    [np.arange(12).reshape(3, 4), np.asfortranarray(np.arange(12).reshape(3, 4)), np.array([True, False])],
    ids=["rows", "columns", "booleans"],
)
def test_arrays_of_numbers_come_back(array, tmp_path):
    saved(tmp_path / "c", {"positions": array, "more": {"deep": [array, (1, array)]}})
    state: dict[str, Any] = {"positions": np.zeros(1), "more": {"deep": []}}
    load(state, storage_reader=SafeReader(tmp_path / "c"), planner=SafeLoadPlanner(), no_dist=True)
    for found in (state["positions"], state["more"]["deep"][0], state["more"]["deep"][1][1]):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
        assert found.flags.writeable
