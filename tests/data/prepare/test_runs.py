"""Sorted runs: what is read is what was written, sorted; the twin sorts all of it in one list."""

import numpy as np
import pytest

from blt_titan.data.prepare.runs import BUCKETS, Choice, Runs, RunWriter, join_runs
from blt_titan.data.store.errors import DataError

HELD_OUT_BELOW = 2**63
KEYS = 40
"""Few, in few buckets, so that keys tie within and between spills."""


def write(folder, *, documents: int, runs: int, memory_bytes: int, seed: int = 0):
    """Write runs of random documents; return the runs, and (split, key, id, text) of all documents."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(2**64, size=KEYS, dtype=np.uint64)
    written, paths = [], []
    for number in range(runs):
        paths.append(folder / f"{number:05d}")
        writer = RunWriter(paths[-1], memory_bytes=memory_bytes, held_out_below=HELD_OUT_BELOW)
        for i in range(documents):
            doc_id, text = f"é{rng.integers(10**6)}-{number}-{i}", rng.bytes(int(rng.integers(1, 300)))
            key, rank = rng.choice(keys), rng.integers(2**64, dtype=np.uint64)
            writer.add(np.array([key, rank], "<u8").tobytes(), doc_id.encode(), text)
            written.append((int(rank < HELD_OUT_BELOW), int(key), doc_id, text))
        writer.finish()
    join_runs(paths, folder / "table.npy")
    return Runs(paths, folder / "table.npy"), written


def read(runs: Runs, first: int, end: int, choice: Choice, memory_bytes: int) -> list[tuple[str, bytes]]:
    return [
        pair
        for documents in runs.read(first, end, choice, memory_bytes=memory_bytes)
        for pair in zip(documents.ids.to_pylist(), documents.texts.to_pylist(), strict=True)
    ]


@pytest.mark.parametrize("held_bytes", [1, 2_000, 10**7], ids=["one document", "some", "all"])
@pytest.mark.parametrize("spilled_bytes", [500, 10_000, 10**7])
def test_documents_come_back_sorted(tmp_path, spilled_bytes, held_bytes):
    runs, written = write(tmp_path, documents=100, runs=3, memory_bytes=spilled_bytes)
    keys = sorted(key for _, key, _, _ in written)
    choices = {
        "all": (Choice(), lambda key, text: True),
        "none longer": (Choice(most_bytes=150), lambda key, text: len(text) <= 150),
        "first and later": (
            Choice(last_key=keys[150], later=(keys[200], keys[299])),
            lambda key, text: key <= keys[150] or key in (keys[200], keys[299]),
        ),
        "only": (Choice(only=keys[10]), lambda key, text: key == keys[10]),
        "without": (Choice(without=keys[10]), lambda key, text: key != keys[10]),
    }
    for name, (choice, takes) in choices.items():
        for split in range(2):
            expected = [(i, text) for s, key, i, text in sorted(written) if s == split and takes(key, text)]
            found = read(runs, split * BUCKETS, (split + 1) * BUCKETS, choice, held_bytes)
            assert found == expected, (name, split)
            assert expected or name == "only"


def test_a_stretch_of_buckets_holds_what_its_sizes_say(tmp_path):
    runs, written = write(tmp_path, documents=200, runs=2, memory_bytes=3_000)
    documents, n_bytes = runs.sizes()
    found = 0
    for bucket in np.flatnonzero(documents).tolist():
        of_bucket = read(runs, bucket, bucket + 1, Choice(), 10**6)
        assert documents[bucket] == len(of_bucket)
        assert n_bytes[bucket] == sum(len(doc_id.encode()) + len(text) for doc_id, text in of_bucket)
        found += len(of_bucket)
    assert found == len(written)


def test_the_same_id_twice_is_refused(tmp_path):
    for number in range(2):
        writer = RunWriter(tmp_path / str(number), memory_bytes=1000, held_out_below=0)
        writer.add(bytes(16), b"a", b"text %d" % number)
        writer.finish()
    paths = [tmp_path / "0", tmp_path / "1"]
    join_runs(paths, tmp_path / "table.npy")
    with pytest.raises(DataError, match="a second document with the id 'a'"):
        read(Runs(paths, tmp_path / "table.npy"), 0, BUCKETS, Choice(), 1000)


@pytest.mark.parametrize("held_bytes", [1, 10**7], ids=["one document", "all"])
def test_every_flipped_bit_and_a_truncation_are_found(tmp_path, held_bytes):
    """In ids as well as in texts."""
    runs, _ = write(tmp_path, documents=10, runs=1, memory_bytes=10**6)
    path = tmp_path / "00000.text"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"00000\.text: damaged since it was written"):
            read(runs, 0, 2 * BUCKETS, Choice(), held_bytes)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"00000\.text: damaged since it was written"):
        read(runs, 0, 2 * BUCKETS, Choice(), held_bytes)
