"""Injuries to files: none gets into a batch, each is named, and a run stops or passes over it as it was told."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from blt_titan.data.prepare.job import prepare
from blt_titan.data.rows import dataset
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.patcher import EntropyPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import SPLITS
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import (
    EntropySidecar,
    EntropySidecars,
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
    sidecar_directory,
)
from blt_titan.patching.rule import PatchRule
from tests.helpers import small_loader
from tests.helpers.lying_shards import rewrite, set_offset
from tests.helpers.small_loader import SHAPE, take

SETTINGS = SidecarSettings("float16", {}, "", "float32")
STREAMS = 4
INJURIES = 10_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Four shards of 64 KiB in record batches of 4 KiB, scored."""
    return make(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.fixture(scope="module")
def stale(tmp_path_factory) -> Path:
    """The same texts prepared with another seed: files of the same names."""
    return make(tmp_path_factory.mktemp("stale"), seed=1)


def make(root: Path, seed: int) -> Path:
    (root / "source").mkdir()
    rng = np.random.default_rng(0)
    for i in range(240):
        text = rng.choice(np.frombuffer(b"abcdefgh  ,\n", np.uint8), int(rng.integers(1, 2000))).tobytes()
        (root / "source" / f"{i}.txt").write_bytes(text)
    prepare(
        [root / "source"],
        root / "data",
        validation_fraction=0.05,
        seed=seed,
        record_batch_bytes=4096,
        shard_bytes=65_536,
        progress=False,
    )
    begin_sidecar(root / "data", "default", SETTINGS)
    for split in SPLITS:
        shards = ShardSet(root / "data", split)
        for entry in shards.entries:
            writer = SidecarWriter(sidecar_directory(root / "data", "default"), entry, "float16")
            for batch in shards:
                if batch.shard_path.name == entry.file:
                    entropies = rng.gamma(1.5, 0.6, len(batch.text)).astype(np.float32)
                    writer.add(batch.batch_in_shard, entropies, batch.crc32)
            writer.finish()
    assert complete_sidecar(root / "data", "default", SETTINGS)
    assert len(ShardSet(root / "data", "train").entries) >= 3
    return root / "data"


def contents(directory: Path) -> list[tuple[bytes, bytes]]:
    """Everything that training reads, record batch by record batch."""
    shards = ShardSet(directory, "train")
    sidecar = EntropySidecar(directory, "default", shards)
    read = []
    for batch in shards:
        read.append((batch.text.tobytes() + batch.offsets.tobytes(), sidecar(batch).tobytes()))
    return read


def flip_bit(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def overwrite(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    begin = int(rng.integers(len(content)))
    stretch = rng.integers(256, size=int(rng.integers(1, 600)), dtype=np.uint8).tobytes()[: len(content) - begin]
    content[begin : begin + len(stretch)] = stretch
    path.write_bytes(content)


def truncate(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size))])


def remove(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def swap(path: Path, rng: np.random.Generator) -> None:
    others = [other for other in path.parent.glob(f"train*{path.suffix}") if other != path]
    if others:
        path.write_bytes(others[int(rng.integers(len(others)))].read_bytes())


INJURE: list[Callable[[Path, np.random.Generator], None]] = [flip_bit, flip_bit, overwrite, truncate, remove, swap]


def test_ten_thousand_injuries_are_found_before_their_bytes_are_used(sound, stale, tmp_path):
    """Each is an error that names a file of the data, or it changed nothing that training reads."""
    directory = tmp_path / "data"

    def make_stale(path: Path, rng: np.random.Generator) -> None:
        path.write_bytes((stale / path.relative_to(directory)).read_bytes())

    shutil.copytree(sound, directory)
    expected = contents(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    # What training reads; not what scoring keeps for itself.
    named = [path for path in files if "validation" not in path.name]
    named = [path for path in named if not path.name.endswith((".done.json", "settings.json"))]
    assert all((stale / path.relative_to(directory)).exists() for path in named)
    injuries = [*INJURE, make_stale]
    rng = np.random.default_rng(0)
    harmless = 0
    messages: list[str] = []
    misleading: list[str] = []
    by_kind: dict[str, int] = {}
    for number in range(INJURIES):
        path, injure = named[number % len(named)], injuries[int(rng.integers(len(injuries)))]
        before = path.read_bytes()
        injure(path, rng)
        try:
            after = contents(directory)
        except DataError as error:
            messages.append(str(error))
            beside = {path.name, path.name.replace(".index.npy", ".arrow"), "manifest.json", "sidecar.json"}
            if not any(name in str(error) for name in beside) and path.suffix != ".json":
                misleading.append(f"{injure.__name__} of {path}: {error}")
            by_kind[injure.__name__] = by_kind.get(injure.__name__, 0) + 1
        else:
            # Footers, padding between messages, spaces in JSON; or the same bytes again.
            assert after == expected, f"{injure.__name__} of {path.name} changed what is read"
            harmless += 1
        path.write_bytes(before)
    assert contents(directory) == expected
    print(f"{len(messages)} found {by_kind}, {harmless} changed nothing that is read")
    assert all(str(directory) in message for message in messages)
    # Each names the file that was injured, or one that says what it should be.
    assert not misleading, misleading[:5]
    assert len(messages) > 0.8 * INJURIES
    assert by_kind.keys() == {injure.__name__ for injure in injuries}


def loader_of(directory: Path, *, quarantine: bool, **changes) -> RowLoader:
    shards = ShardSet(directory, "train")
    sidecars = EntropySidecars([EntropySidecar(directory, "default", shards)])
    source = RowSource(shards, EntropyPatcher(PatchRule("global", 1.0, max_patch_bytes=16), sidecars), SHAPE)
    return RowLoader(source, StreamOrder(len(shards), STREAMS, 0), rows_per_batch=4, quarantine=quarantine, **changes)


@pytest.fixture
def injured(sound, tmp_path) -> tuple[Path, list[int]]:
    """Data with two damaged record batches, one of text and one of entropies; and their numbers."""
    directory = tmp_path / "data"
    shutil.copytree(sound, directory)
    shards = ShardSet(directory, "train")
    for number, folder in ((3, directory), (7, directory / "entropies" / "default")):
        info = shards.record_batch_info(number)
        path = folder / info.shard_path.name
        offset, length = np.load(path.with_suffix(".index.npy"))[info.batch_in_shard, :2]
        content = bytearray(path.read_bytes())
        content[offset + length // 2] ^= 4
        path.write_bytes(content)
    return directory, [3, 7]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_is_the_default_and_names_file_and_record_batch(injured, num_workers):
    directory, _ = injured
    loader = loader_of(directory, quarantine=False, num_workers=num_workers)
    with pytest.raises(DataError, match=r"train-\d+\.arrow: record batch \d+: .*crc32"):
        take(loader, 10_000)


def test_what_lies_with_a_right_checksum_is_damage_like_any_other(tmp_path):
    directory = tmp_path / "data"
    small_loader.write(directory, small_loader.random_documents(0))
    rewrite(directory, set_offset("text", 1, 2**20))
    damage = r"train-00000\.arrow: record batch 0: not a record batch"
    with pytest.raises(DataError, match=damage):
        take(small_loader.loader_of(directory), 10_000)
    log = tmp_path / "quarantined.jsonl"
    loader = small_loader.loader_of(directory, quarantine=True, quarantine_log=log)
    batches = iter(loader)
    while loader.state_dict()["positions"][:, 0].min() < 2:
        next(batches)
    assert loader.take_quarantined() >= 1
    assert "train-00000.arrow: record batch 0: not a record batch" in log.read_text()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_in_quarantine_is_written_down(injured, num_workers, tmp_path):
    directory, damaged = injured
    log = tmp_path / "run" / "quarantined.jsonl"
    loader = loader_of(directory, quarantine=True, num_workers=num_workers, quarantine_log=log)
    batches = iter(loader)
    while loader.state_dict()["positions"][:, 0].min() < len(ShardSet(directory, "train")) // STREAMS + 1:
        next(batches)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) >= loader.take_quarantined() >= len(damaged)
    shards = ShardSet(directory, "train")
    for i, folder in zip(damaged, (directory, directory / "entropies" / "default"), strict=True):
        info = shards.record_batch_info(i)
        where = f"{folder / info.shard_path.name}: record batch {info.batch_in_shard}"
        assert any(where in line["what"] for line in lines)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_quarantine_passes_over_what_is_damaged_and_nothing_else(injured, sound, num_workers, caplog):
    directory, damaged = injured
    shards = ShardSet(sound, "train")
    lost = sum(shards.record_batch_info(i).text_bytes + 2 * shards.record_batch_info(i).rows for i in damaged)
    assert lost
    loader = loader_of(directory, quarantine=True, num_workers=num_workers)
    counted, states = [], []
    batches = iter(loader)
    # Two epochs, so that each is met twice.
    while loader.state_dict()["positions"][:, 0].min() < 2 * len(shards) // STREAMS + 1:
        next(batches)
        counted.append(loader.take_quarantined())
        states.append(loader.state_dict())
    picks = loader.state_dict()["positions"][:, 0]
    order = loader.order
    expected = sum(
        order.record_batch(stream, pick) in damaged for stream in range(STREAMS) for pick in range(int(picks[stream]))
    )
    assert sum(counted) == states[-1]["positions"][:, 3].sum() == expected >= 4
    if not num_workers:
        messages = [record.getMessage() for record in caplog.records]
        for i, folder in zip(damaged, (directory, directory / "entropies" / "default"), strict=True):
            info = shards.record_batch_info(i)
            where = f"{folder / info.shard_path.name}: record batch {info.batch_in_shard}"
            assert any(where in message for message in messages)
    # The rows are those of the same streams without these record batches.
    sound_source = loader_of(sound, quarantine=False).source
    read = sound_source.read
    twin = loader_of(sound, quarantine=True)
    object.__setattr__(twin, "source", _Without(sound_source, read, damaged))
    rows = small_loader.rows_of(take(loader_of(directory, quarantine=True, num_workers=num_workers), 60))
    assert torch.equal(rows, small_loader.rows_of(take(twin, 60)))
    # And a run goes on from any state, counting none twice.
    resumed = loader_of(directory, quarantine=True, num_workers=num_workers)
    resumed.load_state_dict(states[10])
    assert resumed.take_quarantined() == 0
    rest = []
    for _ in itertools.islice(iter(resumed), len(states) - 11):
        rest.append(resumed.take_quarantined())
    assert rest == counted[11:]


class _Without:
    """A source that raises for some record batches."""

    read_ahead = 0

    def __init__(self, source: RowSource, read, damaged: list[int]):
        self.shape, self._read, self._damaged = source.shape, read, damaged

    def load(self, record_batch: int):
        if record_batch in self._damaged:
            raise DataError("damaged")
        return self._read(record_batch)

    def patch(self, loaded):
        return loaded


def test_data_that_is_all_gone_ends_the_run(sound, tmp_path, monkeypatch):
    directory = tmp_path / "data"
    shutil.copytree(sound, directory)
    loader = loader_of(directory, quarantine=True)
    for path in directory.glob("train-*.arrow"):
        path.write_bytes(bytes(path.stat().st_size))
    monkeypatch.setattr(dataset, "MOST_QUARANTINED_IN_A_ROW", 20)
    with pytest.raises(
        DataError, match=r"20 record batches in a row could not be used, the last: .*not an Arrow IPC file"
    ):
        take(loader, 1)
