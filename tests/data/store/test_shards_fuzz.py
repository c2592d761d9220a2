"""Ten thousand shards whose checksums are right and whose numbers lie: each is refused, or what is read is sound.

A child process reads them from memory between two pages that may not be touched, so that a read outside of a file ends
it, and with it the test. It reads 10,000, or as many as `FUZZ` says.
"""

import ctypes
import json
import mmap
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from blt_titan.data.store import folder as folder_module
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import Counts, Manifest, read_manifest, write_manifest
from blt_titan.data.store.shards import SCHEMA, ShardSet, ShardWriter, install
from blt_titan.data.store.sidecars import (
    EntropySidecar,
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
)
from tests.helpers.lying_shards import batch_of, message_of, places, rewrite, write_shard

CASES = int(os.environ.get("FUZZ", "10000"))
ROOT = Path(__file__).parents[3]
STORAGES = ("float16", "uint8")
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    8,
    255,
    2**15,
    2**16,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    -(2**63),
]


class GuardedMap:
    """Memory between two pages that may not be touched, for the content of a file at its end or at its beginning."""

    def __init__(self, n_bytes: int):
        page = mmap.PAGESIZE
        self._map = mmap.mmap(-1, n_bytes + 2 * page)
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + page
        self.end = self.begin + n_bytes
        for guard in (self.begin - page, self.end):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        self.at_end = True

    def read(self, path: str | os.PathLike[str]) -> Any:
        """Return the content of a file, as `map_file` does."""
        content = Path(path).read_bytes()
        address = self.end - len(content) if self.at_end else self.begin
        ctypes.memmove(address, content, len(content))
        return pa.foreign_buffer(address, len(content), self)

    def holds(self, array: np.ndarray) -> bool:
        """Tell whether an array is a view into it; an empty one touches nothing."""
        address = array.__array_interface__["data"][0]
        return not array.size or self.begin <= address <= address + array.nbytes <= self.end


def write_sound(directory: Path) -> None:
    """Write four record batches of a few documents, and their entropies in both storages."""
    rng = np.random.default_rng(0)
    documents = [(f"naïve/{i}.txt", rng.bytes(int(size))) for i, size in enumerate([40, 0, 90, 7, 130, 1, 60, 66])]
    writer = ShardWriter(directory, "train", record_batch_bytes=140, shard_bytes=2**30)
    ids, texts = zip(*documents, strict=True)
    writer.add(pa.array(ids, pa.string()), pa.array(texts, pa.binary()))
    entries = writer.finish()
    install(directory, entries)
    counts = Counts(len(documents), sum(map(len, texts)), 0, 0, 0)
    write_manifest(directory, Manifest({}, counts, {"train": entries, "validation": ()}))
    rewrite(directory, lambda message: None)  # in the layout of this test, whose checksum the sidecars name
    entries = read_manifest(directory).splits["train"]
    for storage in STORAGES:
        settings = SidecarSettings(storage, {}, "", "float32")
        begin_sidecar(directory, storage, settings)
        sidecar = SidecarWriter(directory / "entropies" / storage, entries[0], storage)
        for batch in ShardSet(directory, "train"):
            sidecar.add(batch.batch_in_shard, rng.gamma(1.5, 0.6, len(batch.text)), batch.crc32)
        sidecar.finish()
        assert complete_sidecar(directory, storage, settings)


def put(message: bytearray, at: int, n_bytes: int, value: int) -> None:
    message[at : at + n_bytes] = (value % 256**n_bytes).to_bytes(n_bytes, "little")


def metadata_number(message: bytearray, chance: random.Random, schema: pa.Schema) -> None:
    """Set a number of the message's head: sizes, versions, rows, nulls, places of buffers, pointers of tables."""
    head = 8 + int.from_bytes(message[4:8], "little")
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        n_bytes = chance.choice([1, 2, 4, 8, 8])
        at = chance.randrange(0, head - n_bytes + 1, min(4, n_bytes))
        now = int.from_bytes(message[at : at + n_bytes], "little")
        near = [now + d for d in (-8, -4, -1, 1, 4, 8)]
        put(message, at, n_bytes, chance.choice([*NUMBERS, *near, 2 * now, len(message), len(message) - head]))


def offset_number(message: bytearray, chance: random.Random, schema: pa.Schema) -> None:
    """Set offsets of documents or of their ids; of entropies, values."""
    begin, n_bytes = places(message, schema)[chance.randrange(len(schema))][1]
    for _ in range(chance.choice([1, 1, 2])):
        at = begin + chance.randrange(0, n_bytes - 3, 4)
        now = int.from_bytes(message[at : at + 4], "little")
        put(message, at, 4, chance.choice([*NUMBERS, now - 1, now + 1, now + 8, now + 4096, len(message)]))


def flipped_bits(message: bytearray, chance: random.Random, schema: pa.Schema) -> None:
    for _ in range(chance.choice([1, 2, 8])):
        message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)


def moved_bytes(message: bytearray, chance: random.Random, schema: pa.Schema) -> None:
    """Copy a stretch over another."""
    size = chance.choice([4, 8, 16, 64])
    source, target = (chance.randrange(0, len(message) - size, 4) for _ in range(2))
    message[target : target + size] = message[source : source + size]


def other_length(message: bytearray, chance: random.Random, schema: pa.Schema) -> None:
    """Cut the message, or lengthen it."""
    if chance.random() < 0.5:
        del message[chance.randrange(len(message)) :]
    else:
        message += chance.randbytes(chance.choice([1, 8, 64]))


def other_message(message: bytearray, chance: random.Random, schema: pa.Schema) -> None:
    """Put in its place what Arrow would read: compressed, with nulls, of other types, of another version or kind."""
    batch, _ = batch_of(message, schema)
    column, options = batch.column(chance.randrange(len(schema))), {}
    match chance.randrange(6):
        case 0:
            options = {"compression": chance.choice(["lz4", "zstd"])}
        case 1:
            options = {"metadata_version": pa.ipc.MetadataVersion.V4}
        case 2:
            options = {"use_legacy_format": True}
        case 3:
            batch = pa.record_batch([pa.array([*c[:-1].to_pylist(), None], c.type) for c in batch], schema=schema)
        case 4:
            batch = pa.record_batch([column.cast(pa.large_binary()) if len(schema) > 1 else column, column], ["a", "b"])
        case _:
            message[:] = schema.serialize()
            return
    message[:] = message_of(batch, **options)


Mutate = Callable[[bytearray, random.Random, pa.Schema], None]
MUTATIONS: list[Mutate] = [
    *(metadata_number, metadata_number, metadata_number, offset_number, offset_number),
    *(flipped_bits, moved_bytes, other_length, other_message),
]


def lying_index(index: np.ndarray, chance: random.Random) -> np.ndarray:
    match chance.randrange(6):
        case 0:
            return index.astype(chance.choice([np.int32, np.float64, np.uint64]))
        case 1:
            return chance.choice([index[:1], index[:, :4], index.T, index.reshape(-1), np.vstack([index, index])])
        case _:
            lying = index.copy()
            row, column = chance.randrange(len(index)), chance.randrange(4)
            now = int(index[row, column])
            near = [now - 8, now - 1, now + 1, now + 8, *index[:, column].tolist()]
            lying[row, column] = chance.choice([n for n in [*NUMBERS, *near] if -(2**63) <= n < 2**63])
            return lying


class Sound(NamedTuple):
    """The files of a shard or a sidecar as they were written."""

    files: dict[Path, bytes]
    listed: str
    schema: pa.Schema
    messages: list[bytes]
    index: np.ndarray

    @classmethod
    def of(cls, folder: Path, listed: str, schema: pa.Schema) -> "Sound":
        shard, index_path = folder / "train-00000.arrow", folder / "train-00000.index.npy"
        content, index = shard.read_bytes(), np.load(index_path)
        messages = [content[offset : offset + length] for offset, length in index[:, :2].tolist()]
        files = {path: path.read_bytes() for path in (shard, index_path, folder / listed)}
        return cls(files, listed, schema, messages, index)

    def restore(self) -> None:
        for path, content in self.files.items():
            path.write_bytes(content)


class Fuzz:
    """Makes the cases and reads them."""

    def __init__(self, directory: Path):
        self.directory = directory
        text = (directory, "manifest.json", SCHEMA)
        sidecars = [(directory / "entropies" / s, "sidecar.json", pa.schema({"e": s})) for s in STORAGES]
        self.sound = {folder: Sound.of(folder, listed, schema) for folder, listed, schema in (text, *sidecars)}
        self.guarded = {folder: GuardedMap(1 << 16) for folder in self.sound}
        folder_module.map_file = lambda path: self.guarded[Path(path).parent].read(path)

    def write(self, folder: Path, chance: random.Random) -> str:
        """Write a file that lies; return the kind of lie."""
        _, listed, schema, messages, index = self.sound[folder]
        messages = [bytearray(message) for message in messages]
        if chance.random() < 0.15:
            write_shard(folder, messages, index, listed=listed, edit_index=lambda sound: lying_index(sound, chance))
            return "lying_index"
        if chance.random() < 0.05:
            edit = partial(flipped_bits, chance=chance, schema=schema)
            write_shard(folder, messages, index, listed=listed, edit_index_bytes=edit)
            return "index_bytes"
        if chance.random() < 0.05:
            key = chance.choice(
                ["record_batches", "documents", "text_bytes"] if folder == self.directory else ["file_bytes"]
            )
            change = {key: chance.choice([*NUMBERS, 2**70, None, 1.5])}
            write_shard(folder, messages, index, listed=listed, edit_entry=lambda entry: entry.update(change))
            return "entry"
        # The last lies against the page that may not be touched.
        number = chance.choice([*range(len(messages)), len(messages) - 1, len(messages) - 1])
        mutate = chance.choice(MUTATIONS)
        mutate(messages[number], chance, schema)
        index = index.copy()
        if chance.random() < 0.3 and folder == self.directory:  # and the index and the manifest agree with the message
            index[number, chance.choice([2, 3])] = chance.choice([0, 1, 2, 3, 100, 200])
        documents, text_bytes = index[:, 2:4].sum(0).tolist()
        agree = {"documents": documents, "text_bytes": text_bytes} if folder == self.directory else {}
        write_shard(folder, messages, index, listed=listed, edit_entry=lambda entry: entry.update(agree))
        if agree:
            manifest = json.loads((folder / listed).read_bytes())
            manifest["counts"] |= agree
            (folder / listed).write_text(json.dumps(manifest))
        return mutate.__name__

    def read(self, sidecar: str | None) -> None:
        """Read everything, and see that it is sound; the only error is DataError."""
        shard_set = ShardSet(self.directory, "train")
        read_entropies = EntropySidecar(self.directory, sidecar, shard_set) if sidecar else None
        for batch in shard_set:
            assert all(self.guarded[self.directory].holds(view) for view in (batch.text, batch.id_bytes))
            assert batch.offsets[[0, -1]].tolist() == [0, len(batch.text)]
            assert (np.diff(batch.offsets) >= 0).all()
            assert sum(len(batch.document(row).tobytes()) for row in range(batch.rows)) == len(batch.text)
            assert [type(name) for name in batch.doc_ids] == [str] * batch.rows
            if read_entropies:
                found = read_entropies(batch)
                assert (found.dtype, found.shape) == (np.float32, batch.text.shape)
                assert (np.isfinite(found) & (found >= 0)).all()

    def outcome(self, folder: Path) -> str:
        try:
            self.read(None if folder == self.directory else folder.name)
        except DataError as error:
            return "refused" if str(self.directory) in str(error) else f"refused without a name: {error}"
        return "sound"

    def run(self, cases: range, progress: Path) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        with progress.open("wb", buffering=0) as now:
            for number in cases:
                os.pwrite(now.fileno(), b"%08d" % number, 0)
                chance = random.Random(number)
                at_end = chance.random() < 0.8
                for guarded in self.guarded.values():
                    guarded.at_end = at_end
                folder = chance.choice([self.directory, *self.sound])
                kind = self.write(folder, chance)
                outcomes[f"{kind}: {self.outcome(folder)}"] += 1
                self.sound[folder].restore()
        return outcomes


def test_shards_that_lie_are_refused_or_read_soundly(tmp_path):
    write_sound(tmp_path)
    command = [sys.executable, "-X", "faulthandler", "-m", __name__, str(tmp_path), str(CASES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    at = (tmp_path / "case").read_text() if (tmp_path / "case").exists() else "none"
    assert done.returncode == 0, f"case {at}: exit {done.returncode}\n{done.stderr[-3000:]}"
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == CASES
    assert {kind.partition(": ")[2] for kind in outcomes} == {"sound", "refused"}
    refused = sum(count for kind, count in outcomes.items() if kind.endswith("refused"))
    # Bits of text may change, and padding.
    assert 0.6 * CASES < refused < CASES
    print(outcomes)


def test_a_read_outside_would_end_the_child():
    code = (
        "from tests.data.store.test_shards_fuzz import GuardedMap; import ctypes; m = GuardedMap(4096);"
        "ctypes.string_at(m.begin, 4096); print('inside', flush=True); ctypes.string_at({}, 1)"
    )
    for address in ("m.begin - 1", "m.end"):
        done = subprocess.run([sys.executable, "-c", code.format(address)], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "inside\n"
        assert done.returncode < 0


if __name__ == "__main__":
    fuzz = Fuzz(Path(sys.argv[1]))
    fuzz.read("float16")
    print(json.dumps(fuzz.run(range(int(sys.argv[2])), Path(sys.argv[1], "case"))))
