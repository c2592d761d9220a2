"""What `inspect_data` prints, and that it names every damaged shard."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest

from blt_titan.commands.inspect import main
from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.manifest import SPLITS
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import (
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
    sidecar_directory,
)
from tests.helpers.lying_shards import rewrite, set_offset

SETTINGS = SidecarSettings("float16", {}, "", "float32")


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    for i in range(40):
        (tmp_path / "source" / f"{i}.txt").write_bytes(b"text %d " % i * 20)
    (tmp_path / "bad.jsonl").write_bytes(b"{\n")
    prepare(
        [tmp_path / "source", tmp_path / "bad.jsonl"],
        tmp_path / "data",
        validation_fraction=0.1,
        seed=0,
        record_batch_bytes=500,
        shard_bytes=2000,
        on_error="skip",
        progress=False,
    )
    return tmp_path / "data"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_sound_data(data, capsys):
    assert main([str(data), "--no-progress", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert f"{data.parent}/source" in out
    assert "skipped: " in out
    assert "bad.jsonl, line 1: not JSON" in out
    assert out.count("\ntrain source/") == 2
    assert "40" in out.split("\n")[1].split()
    assert "all sound" in out


def test_every_damaged_shard_is_named(data, capsys):
    shards = sorted(data.glob("train-*.arrow"))
    assert len(shards) > 3
    damage(shards[1])
    damage(shards[2].with_suffix(".index.npy"))
    shards[3].unlink()
    assert main([str(data), "--no-progress"]) == 1
    faults = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]
    assert len(faults) == 3
    for shard, fault in zip(shards[1:4], faults, strict=True):
        assert str(shard.with_suffix("")) in fault
    assert main([str(data), "--no-progress", "--no-verify"]) == 0
    assert main([str(data / "nothing")]) == 2


def test_a_shard_that_lies_is_named_although_its_checksums_are_right(data, capsys):
    for shard, lie in (("train-00000", set_offset("doc_id", 1, 2**30)), ("train-00001", set_offset("text", 1, 2**20))):
        rewrite(data, lie, shard=shard)
    assert main([str(data), "--no-progress"]) == 1
    printed = capsys.readouterr()
    assert "all sound" not in printed.out
    for shard in ("train-00000", "train-00001"):
        assert f"damaged: {data / shard}.arrow: record batch 0: not a record batch of byte documents" in printed.err


def test_entropies_are_checked_too(data, capsys):
    begin_sidecar(data, "default", SETTINGS)
    for split in SPLITS:
        for entry in ShardSet(data, split).entries:
            writer = SidecarWriter(sidecar_directory(data, "default"), entry, "float16")
            for batch in ShardSet(data, split, only=entry.file):
                writer.add(batch.batch_in_shard, np.ones(len(batch.text)), batch.crc32)
            writer.finish()
    assert complete_sidecar(data, "default", SETTINGS)
    assert main([str(data), "--no-progress"]) == 0
    assert "entropies: default" in capsys.readouterr().out
    damage(data / "entropies" / "default" / "train-00001.arrow")
    assert main([str(data), "--no-progress"]) == 1
    assert "entropies/default/train-00001.arrow" in capsys.readouterr().err


def test_an_object_store_is_inspected_shard_by_shard(data, capsys):
    fs = fsspec.filesystem("memory")
    for path in data.glob("*"):
        fs.pipe_file(f"/inspected/{path.name}", path.read_bytes())
    assert main(["memory://inspected", "--no-progress"]) == 0
    assert "all sound" in capsys.readouterr().out
    damage(data / "train-00001.arrow")
    fs.pipe_file("/inspected/train-00001.arrow", (data / "train-00001.arrow").read_bytes())
    assert main(["memory://inspected/", "--no-progress"]) == 1
    assert "memory://inspected/train-00001.arrow: record batch" in capsys.readouterr().err
    assert main(["memory://empty"]) == 2


def test_as_json(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / f"texts/{number}.txt").write_text("text " * 100)
    prepare([tmp_path / "texts"], tmp_path / "out", validation_fraction=0.2, seed=0, progress=False)
    assert main([str(tmp_path / "out"), "--json", "--no-progress"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"]["documents"] == sum(split["documents"] for split in said["splits"].values()) == 20
    assert (said["verified"], said["damaged"]) == (True, [])
    shard = tmp_path / "out/train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main([str(tmp_path / "out"), "--json", "--no-progress"]) == 1
    [fault] = json.loads(capsys.readouterr().out)["damaged"]
    assert "train-00000.arrow" in fault
