import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blt_titan.data import prepare as prepare_module
from blt_titan.data.errors import DataError
from blt_titan.data.manifest import MANIFEST_NAME, read_manifest
from blt_titan.data.prepare import PrepareSummary, prepare
from blt_titan.data.shards import ShardSet
from scripts.prepare_data import main, size


@pytest.fixture
def source(tmp_path) -> Path:
    """Sixty files of random text, one of them empty, one binary."""
    directory = tmp_path / "source"
    directory.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        (directory / f"{i}.txt").write_bytes(rng.integers(32, 255, 50 + 10 * i, np.uint8).tobytes())
    (directory / "empty").write_bytes(b"")
    (directory / "binary").write_bytes(b"\0")
    return directory


def run(source: Path, out: Path, **settings) -> PrepareSummary:
    defaults = {"validation_fraction": 0.2, "seed": 0, "record_batch_bytes": 1000, "shard_bytes": 8000}
    return prepare([source], out, progress=False, **(defaults | settings))


def texts(out: Path, split: str) -> dict[str, bytes]:
    return {
        doc_id: batch.document(row).tobytes()
        for batch in ShardSet(out, split)
        for row, doc_id in enumerate(batch.doc_ids)
    }


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_splits_are_disjoint_and_complete(source, tmp_path):
    summary = run(source, tmp_path / "out")
    train, validation = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert not train.keys() & validation.keys()
    assert train | validation == {f"{i}.txt": (source / f"{i}.txt").read_bytes() for i in range(60)}
    assert 3 <= len(validation) <= 25  # a fifth of 60, give or take four standard deviations
    counts = summary.manifest.counts
    assert (counts.documents, counts.empty_documents_left_out, counts.binary_files_left_out) == (60, 1, 1)
    assert counts.text_bytes == sum(map(len, (train | validation).values()))
    assert len(summary.manifest.splits["train"]) > 1
    assert "60 documents" in str(summary)
    ShardSet(tmp_path / "out", "train").verify_checksums()


def test_the_same_seed_gives_the_same_bytes_whatever_the_listing_order(source, tmp_path, monkeypatch):
    run(source, tmp_path / "a")
    list_documents = prepare_module.list_documents

    def backwards(*args, **kwargs):
        listing = list_documents(*args, **kwargs)
        listing.documents.reverse()
        return listing

    monkeypatch.setattr(prepare_module, "list_documents", backwards)
    run(source, tmp_path / "b")
    run(source, tmp_path / "c", seed=1)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert list(texts(tmp_path / "a", "train")) != list(texts(tmp_path / "c", "train"))
    assert texts(tmp_path / "a", "validation").keys() != texts(tmp_path / "c", "validation").keys()


def test_the_split_of_a_document_does_not_depend_on_other_documents(source, tmp_path):
    run(source, tmp_path / "a")
    for i in range(30):
        (source / f"{i}.txt").unlink()
    run(source, tmp_path / "b")
    assert texts(tmp_path / "b", "validation").items() <= texts(tmp_path / "a", "validation").items()
    assert texts(tmp_path / "b", "train").items() <= texts(tmp_path / "a", "train").items()


def test_max_bytes_takes_whole_documents_in_the_order_of_the_seed(source, tmp_path):
    run(source, tmp_path / "all", validation_fraction=0)
    summary = run(source, tmp_path / "some", validation_fraction=0, max_bytes=5000)
    expected, left = [], 5000
    for doc_id, text in texts(tmp_path / "all", "train").items():
        if len(text) <= left:
            expected.append(doc_id)
            left -= len(text)
    assert list(texts(tmp_path / "some", "train")) == expected
    assert summary.manifest.counts.documents_over_max_bytes == 60 - len(expected)
    with pytest.raises(DataError, match=r"0\.txt: the smallest document has 50 bytes, more than max_bytes 49"):
        run(source, tmp_path / "none", max_bytes=49)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("seed", range(3))
def test_neither_split_is_empty(source, tmp_path, fraction, seed):
    run(source, tmp_path / "out", validation_fraction=fraction, seed=seed)
    sizes = {split: len(texts(tmp_path / "out", split)) for split in ("train", "validation")}
    assert sorted(sizes.values()) == [1, 59]
    assert (sizes["train"] == 59) == (fraction < 0.5)


def test_without_a_fraction_or_with_one_document_all_is_train(source, tmp_path):
    run(source, tmp_path / "a", validation_fraction=0)
    run(source / "7.txt", tmp_path / "b", validation_fraction=0.999999)
    for out, documents in (("a", 60), ("b", 1)):
        assert ShardSet(tmp_path / out, "train").documents == documents
        with pytest.raises(DataError, match="holds no documents"):
            ShardSet(tmp_path / out, "validation")


def test_running_again_does_nothing(source, tmp_path):
    out = tmp_path / "out"
    assert not run(source, out).already_done
    before, times = files(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(source, out)
    assert again.already_done
    assert "nothing to do" in str(again)
    assert files(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_other_settings_are_refused_unless_overwriting(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    (out / "notes.txt").write_bytes(b"mine")
    (out / "train-99999.arrow").write_bytes(b"mine too")
    before = files(out)
    with pytest.raises(DataError, match=r"seed 0 there, 1 now.*--overwrite"):
        run(source, out, seed=1)
    assert files(out) == before
    run(source, out, seed=1, shard_bytes=2**30, overwrite=True)
    after = files(out)
    assert (after.pop("notes.txt"), after.pop("train-99999.arrow")) == (b"mine", b"mine too")
    manifest = read_manifest(out)
    assert after.keys() == manifest.file_names() | {MANIFEST_NAME}
    assert manifest.settings["seed"] == 1


def test_damage_is_noticed_when_running_again(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    (out / "train-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"train-00000\.arrow: No such file.*--overwrite"):
        run(source, out)
    run(source, out, overwrite=True)
    ShardSet(out, "train").verify_checksums()


def test_a_file_that_is_not_ours_is_never_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-00000.arrow").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"train-00000\.arrow: is there already, and no manifest names it"):
        run(source, out)
    assert files(out) == {"train-00000.arrow": b"mine"}


@pytest.mark.parametrize("renames", [0, 1, 3])
@pytest.mark.parametrize("overwriting", [False, True])
def test_an_interrupted_run_is_cleaned_up_by_the_next(source, tmp_path, monkeypatch, renames, overwriting):
    out, clean = tmp_path / "out", tmp_path / "clean"
    run(source, clean, seed=1)
    if overwriting:
        run(source, out)
    replace, calls = os.replace, []

    def interrupted(*args):
        if len(calls) > renames:
            raise KeyboardInterrupt
        calls.append(args)
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, out, seed=1, overwrite=overwriting)
    monkeypatch.undo()
    run(source, out, seed=1, overwrite=overwriting)
    assert files(out) == files(clean)


def test_leftovers_of_a_killed_run_are_removed(source, tmp_path):
    out, clean = tmp_path / "out", tmp_path / "clean"
    run(source, clean)
    out.mkdir()
    for name in ("train-00007.arrow.tmp", "validation-00000.index.npy.tmp", "manifest.json.installing.partial"):
        (out / name).write_bytes(b"half")
    run(source, out)
    assert files(out) == files(clean)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device.*free some space"):
        run(source, tmp_path / "out")
    assert files(tmp_path / "out") == {}


def test_a_file_size_limit_while_arrow_writes_is_reported(source, tmp_path):
    """The operating system refuses the write itself, inside Arrow, in a process of its own."""
    program = (
        "import resource, sys; from scripts.prepare_data import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), "--no-progress"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "cannot be written (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert files(tmp_path / "out") == {}


def test_an_out_that_cannot_be_a_directory_is_refused(source, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="cannot be written"):
            run(source, out)


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_fraction": 1.0},
        {"validation_fraction": float("nan")},
        {"seed": -1},
        {"max_bytes": 0},
        {"record_batch_bytes": 0},
        {"record_batch_bytes": 2**31},
        {"shard_bytes": 0},
    ],
)
def test_settings_out_of_range_are_refused(source, tmp_path, settings):
    (name,) = settings
    with pytest.raises(DataError, match=f"{name} is .*; it may be"):
        run(source, tmp_path / "out", **settings)


def test_sources_that_cannot_work_are_refused(source, tmp_path):
    with pytest.raises(DataError, match="lies inside the source"):
        run(source, source / "out")
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(DataError, match="nothing: no documents"):
        run(empty, tmp_path / "out")
    (source / "a.jsonl").write_bytes(b'{"text": "first"}\n')
    (source / "a.jsonl#L1").write_bytes(b"second")
    with pytest.raises(DataError, match=r"a second document with the id 'a\.jsonl#L1'"):
        run(source, tmp_path / "out")


def test_the_command_line(source, tmp_path, capsys):
    command = ["--source", str(source), "--out", str(tmp_path / "out"), "--record-batch-bytes", "1KiB", "--no-progress"]
    assert main(command) == 0
    assert "60 documents" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out").settings["record_batch_bytes"] == 1024
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*command, "--seed", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prepare_data: error: ")
    assert captured.err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--max-bytes", "3 apples"])
    assert "'3 apples' is not a size" in capsys.readouterr().err


def test_sizes():
    sizes = {"300": 300, "16KiB": 16384, "4MB": 4_000_000, "1GiB": 2**30, "2 tb": 2 * 10**12, "1.5k": 1500, "7B": 7}
    assert {text: size(text) for text in sizes} == sizes
