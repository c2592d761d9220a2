"""Scoring data sets: equal to one document at a time, on any number of ranks, and after an interruption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan.byte_vocab import BYTE_OFFSET, document_ids
from blt_titan.checkpoint.description import Description
from blt_titan.commands.score import main
from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import SPLITS, read_manifest
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import EntropySidecar, sidecar_directory
from blt_titan.model.args import BLTArgs
from blt_titan.patching import entropy_patch_starts
from blt_titan.patching.rounding import from_storage, to_storage
from blt_titan.scoring import score_data as module
from blt_titan.scoring.entropies import EntropyScorer
from blt_titan.scoring.online import OnlineEntropies
from blt_titan.scoring.score_data import score_data, sidecar_settings
from tests.helpers.small_entropy_model import ARGS, ENTROPY_ATOL, model_of, scored_alone

EDGE_NATS = 1e-4
"""Values this near to a rounding midpoint or to the threshold may fall on either side."""
THRESHOLD = 2 + 2**-10
"""Amid two float16 values, 2 and 2 + 2**-9."""


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    for i in range(60):
        text = rng.choice(np.frombuffer(b"abcd \n", np.uint8), 5 + 17 * i).tobytes()
        (tmp_path / "source" / f"{i}.txt").write_bytes(text)
    prepare(
        [tmp_path / "source"],
        tmp_path / "data",
        validation_fraction=0.1,
        seed=0,
        record_batch_bytes=2000,
        shard_bytes=8000,
        progress=False,
    )
    return tmp_path / "data"


def scorer() -> EntropyScorer:
    return EntropyScorer(model_of(), lanes=3, chunk=128)


def run(data: Path, **changes):
    return score_data(data, "default", scorer(), sidecar_settings(model_of(), "float16", "float32"), **changes)


def files(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sidecar_directory(data, "default").iterdir()}


def test_scores_and_boundaries_equal_one_document_at_a_time(data):
    summary = run(data)
    manifest = read_manifest(data)
    assert summary.complete
    assert summary.shards == sum(len(shards) for shards in manifest.splits.values()) > 3
    assert summary.text_bytes == manifest.counts.text_bytes
    model = model_of()
    edges = differing = n_bytes = 0
    for split in SPLITS:
        shards = ShardSet(data, split)
        sidecar = EntropySidecar(data, "default", shards)
        for batch in shards:
            entropies = sidecar(batch)
            for row in range(batch.rows):
                ids = document_ids(batch.document(row).tobytes())
                alone = scored_alone(model, ids)
                stored = entropies[batch.offsets[row] : batch.offsets[row + 1]]
                rounded = from_storage(to_storage(alone[1:-1], "float16"))
                spacing = np.spacing(rounded.astype(np.float16)).astype(np.float32)
                assert (np.abs(stored - alone[1:-1]) <= ENTROPY_ATOL + spacing).all()
                near = np.abs(alone[1:-1] - THRESHOLD) < EDGE_NATS
                differ = (stored > THRESHOLD) != (rounded > THRESHOLD)
                assert not (differ & ~near).any()
                edges, differing, n_bytes = edges + near.sum(), differing + differ.sum(), n_bytes + len(near)
    print(f"{differing} boundaries differ, {edges} of {n_bytes} bytes are near a decision edge")
    assert edges < 0.01 * n_bytes


def test_any_number_of_ranks_makes_the_same_files(data):
    run(data)
    expected = files(data)
    for path in sidecar_directory(data, "default").iterdir():
        path.unlink()
    summaries = [run(data, rank=rank, ranks=3) for rank in (1, 0, 2)]
    assert [summary.complete for summary in summaries] == [False, False, True]
    assert sum(summary.shards for summary in summaries) == len(
        [shard for shards in read_manifest(data).splits.values() for shard in shards]
    )
    assert files(data) == expected


@pytest.mark.parametrize("stop_after", [0, 1, 9])
def test_an_interrupted_run_goes_on_with_the_shards_that_are_missing(data, monkeypatch, stop_after):
    run(data)
    expected = files(data)
    for path in sidecar_directory(data, "default").iterdir():
        path.unlink()
    requests, read = module._requests, 0

    def stopping(*args):
        nonlocal read
        for request in requests(*args):
            if read == stop_after:
                raise KeyboardInterrupt
            read += 1
            yield request

    with monkeypatch.context() as patch:
        patch.setattr(module, "_requests", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(data)
    finished = {path: path.stat().st_mtime_ns for path in sidecar_directory(data, "default").glob("*.arrow")}
    assert not list(sidecar_directory(data, "default").glob("*.tmp"))
    summary = run(data)
    assert summary.complete
    assert files(data) == expected
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    total = len([shard for shards in read_manifest(data).splits.values() for shard in shards])
    assert summary.shards == total - len(finished)
    again = run(data)
    assert (again.complete, again.shards) == (True, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda d: (d / "train-00000.arrow").unlink(),
    "cut short": lambda d: (d / "train-00001.arrow").write_bytes(b"short"),
    "index": lambda d: flip_a_bit(d / "train-00000.index.npy"),
    "sidecar.json": lambda d: (d / "sidecar.json").write_text("{"),
    "settings.json": lambda d: (d / "settings.json").write_text("{"),
    "entry": lambda d: (d / "train-00001.arrow.done.json").write_text("{"),
    "one bit": lambda d: flip_a_bit(d / "train-00001.arrow"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_scored_again_and_nothing_else(data, damage):
    run(data)
    expected = files(data)
    DAMAGE[damage](sidecar_directory(data, "default"))
    assert files(data) != expected
    # A flipped bit shows only to who reads all.
    summary = run(data, verify=damage == "one bit")
    assert summary.complete
    assert summary.shards == (damage not in ("sidecar.json", "settings.json"))
    if damage == "settings.json":
        assert json.loads(expected["sidecar.json"])["settings"] == json.loads(files(data)["sidecar.json"])["settings"]
    else:
        assert files(data) == expected


def test_text_that_was_prepared_again_is_scored_again(data, tmp_path):
    run(data)
    prepare(
        [tmp_path / "source"],
        data,
        validation_fraction=0.1,
        seed=1,
        record_batch_bytes=2000,
        shard_bytes=8000,
        overwrite=True,
        progress=False,
    )
    with pytest.raises(DataError, match="has other text; the data was prepared again since: score it again"):
        EntropySidecar(data, "default", ShardSet(data, "train"))
    summary = run(data)
    assert summary.complete
    assert summary.shards == sum(len(shards) for shards in read_manifest(data).splits.values())
    EntropySidecar(data, "default", ShardSet(data, "train"))


def score_as(rank: int, ranks: int, data: Path, begin: Any) -> None:
    torch.set_num_threads(1)
    begin.wait()
    run(data, rank=rank, ranks=ranks)


@pytest.mark.slow
def test_ranks_that_finish_together_make_one_sidecar(data):
    """Each shard twice: as of two launches of three ranks over one directory."""
    run(data)
    expected = files(data)
    context = torch.multiprocessing.get_context("spawn")
    for path in sidecar_directory(data, "default").iterdir():
        path.unlink()
    begin = context.Barrier(6)
    ranks = [context.Process(target=score_as, args=(rank % 3, 3, data, begin)) for rank in range(6)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    assert run(data).complete
    assert files(data) == expected


def test_online_gives_what_the_sidecar_holds(data):
    run(data)
    shards = ShardSet(data, "train")
    sidecar, online = EntropySidecar(data, "default", shards), OnlineEntropies(scorer())
    differing = n_bytes = 0
    for batch in shards:
        stored, made = sidecar(batch), online(batch)
        # Other neighbours in the lanes, so other sums; most round alike.
        assert np.abs(stored - made).max() <= ENTROPY_ATOL + np.spacing(np.float16(stored.max()))
        starts = [entropy_patch_starts(h, threshold=THRESHOLD) for h in (stored, made)]
        near = np.abs(stored - THRESHOLD) < EDGE_NATS + np.spacing(np.float16(THRESHOLD))
        assert ((starts[0] != starts[1])[1:] <= near[:-1]).all()
        differing, n_bytes = differing + (stored != made).sum(), n_bytes + len(stored)
    assert differing <= 0.01 * n_bytes
    assert online.seconds > 0


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = model_of()
    state = {"model": Description("blt_entropy", ARGS).to_json(), "step": 3}
    save(
        {**model.state_dict(), "train_state": state},
        checkpoint_id=str(tmp_path / "run/checkpoint/step-3"),
        no_dist=True,
    )
    return tmp_path / "run"


def test_the_command_scores_with_a_run_s_last_checkpoint(data, checkpoint, capsys):
    arguments = ["--data", str(data), "--checkpoint", str(checkpoint), "--no-progress", "--device", "cpu"]
    assert main(arguments) == 0
    assert "complete" in capsys.readouterr().out
    batch = ShardSet(data, "train").read(0)
    ids = document_ids(batch.document(0).tobytes())
    stored = EntropySidecar(data, "default", ShardSet(data, "train"))(batch)[: len(ids) - 2]
    np.testing.assert_allclose(stored, scored_alone(model_of(), ids)[ids >= BYTE_OFFSET], atol=3e-3)
    assert main([*arguments, "--quantize", "uint8"]) == 2
    assert "made with another storage" in capsys.readouterr().err
    assert main([*arguments, "--quantize", "uint8", "--name", "small"]) == 0
    assert "boundaries of uint8 codes that are not those of float16" in capsys.readouterr().out


def test_what_is_not_an_entropy_model_is_refused(data, tmp_path, capsys):
    state = {"model": Description("blt", BLTArgs()).to_json()}
    save({"w": torch.ones(1), "train_state": state}, checkpoint_id=str(tmp_path / "blt/step-1"), no_dist=True)
    save({"w": torch.ones(1)}, checkpoint_id=str(tmp_path / "bare/step-1"), no_dist=True)
    for path, message in (
        ("blt", "holds a model 'blt', not an entropy model"),
        ("bare", "does not say what model it holds"),
        ("nothing", "no such directory"),
        (".", "neither a complete checkpoint"),
    ):
        assert main(["--data", str(data), "--checkpoint", str(tmp_path / path), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
