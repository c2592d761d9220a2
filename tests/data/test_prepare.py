import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from blt_titan.data import prepare as prepare_module
from blt_titan.data import prepare_plan, prepare_work
from blt_titan.data import sources as sources_module
from blt_titan.data.destination import LocalDestination
from blt_titan.data.errors import DataError
from blt_titan.data.manifest import MANIFEST_NAME, parse_manifest, read_manifest
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


def run(source: Path | str, out: Path | str, **settings) -> PrepareSummary:
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


def hold_only(monkeypatch, text_bytes: int) -> None:
    """Let workers hold so much text only, as much larger data would."""
    monkeypatch.setattr(prepare_module, "least_memory_bytes", lambda _: 0)
    monkeypatch.setattr(prepare_work, "least_worker_bytes", lambda _: prepare_module.MEMORY_BYTES - text_bytes)
    monkeypatch.setattr(prepare_work, "_PROCESS_BYTES", prepare_module.MEMORY_BYTES - 2 * text_bytes)


def test_the_same_seed_gives_the_same_bytes_whatever_order_workers_and_memory(source, tmp_path, monkeypatch):
    run(source, tmp_path / "a")
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 60_000)
    for workers in (2, 3):
        run(source, tmp_path / f"{workers} workers", workers=workers)
    for text_bytes in (500, 1500, 5000):
        with monkeypatch.context() as patch:
            hold_only(patch, text_bytes)
            run(source, tmp_path / f"memory {text_bytes}")
    list_extents = prepare_module.list_extents
    monkeypatch.setattr(
        prepare_module, "list_extents", lambda sources, revisions: list_extents(sources, revisions)[::-1]
    )
    run(source, tmp_path / "backwards")
    run(source, tmp_path / "another seed", seed=1)
    assert len(list((tmp_path / "a").glob("train-*.arrow"))) > 1
    for name in ("2 workers", "3 workers", "memory 500", "memory 1500", "memory 5000", "backwards"):
        assert files(tmp_path / name) == files(tmp_path / "a"), name
    assert list(texts(tmp_path / "a", "train")) != list(texts(tmp_path / "another seed", "train"))
    assert texts(tmp_path / "a", "validation").keys() != texts(tmp_path / "another seed", "validation").keys()


def test_the_order_is_that_of_the_keyed_hash(source, tmp_path, monkeypatch):
    """Over several shards, spills and units; the twin sorts all documents at once."""
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 25_000)
    hold_only(monkeypatch, 1000)
    out = tmp_path / "out"
    run(source, out, seed=5)
    for split in ("train", "validation"):
        ids = list(texts(out, split))
        assert ids == sorted(ids, key=lambda doc_id: prepare_work.keyed_hashes(5, doc_id.encode()))


def test_the_split_of_a_document_does_not_depend_on_other_documents(source, tmp_path):
    run(source, tmp_path / "a")
    for i in range(30):
        (source / f"{i}.txt").unlink()
    run(source, tmp_path / "b")
    assert texts(tmp_path / "b", "validation").items() <= texts(tmp_path / "a", "validation").items()
    assert texts(tmp_path / "b", "train").items() <= texts(tmp_path / "a", "train").items()


@pytest.mark.parametrize("index_rows", [1, 7, 1000])
def test_max_bytes_takes_whole_documents_in_the_order_of_the_seed(source, tmp_path, monkeypatch, index_rows):
    monkeypatch.setattr(prepare_plan, "_INDEX_ROWS_AT_ONCE", index_rows)
    (source / "long.txt").write_bytes(b"x" * 6000)
    run(source, tmp_path / "all", validation_fraction=0)
    summary = run(source, tmp_path / "some", validation_fraction=0, max_bytes=5000)
    expected, left = [], 5000
    for doc_id, text in texts(tmp_path / "all", "train").items():
        if len(text) <= left:
            expected.append(doc_id)
            left -= len(text)
    assert 3 < len(expected) < 50
    assert list(texts(tmp_path / "some", "train")) == expected
    assert summary.manifest.counts.documents_over_max_bytes == 61 - len(expected)
    with pytest.raises(DataError, match=r"0\.txt: the smallest document has 50 bytes, more than max_bytes 49"):
        run(source, tmp_path / "none", max_bytes=49)


def test_max_bytes_with_a_held_out_split_takes_the_same_documents(source, tmp_path):
    run(source, tmp_path / "a", validation_fraction=0, max_bytes=9000)
    run(source, tmp_path / "b", validation_fraction=0.3, max_bytes=9000)
    run(source, tmp_path / "c", validation_fraction=1e-9, max_bytes=9000)
    together = texts(tmp_path / "a", "train")
    for out in ("b", "c"):
        train, validation = (texts(tmp_path / out, split) for split in ("train", "validation"))
        assert train
        assert validation
        assert train | validation == together


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
    assert (out / "train-00000.arrow").read_bytes() == b"mine"
    assert not (out / MANIFEST_NAME).exists()
    (out / "train-00000.arrow").unlink()
    run(source, out)
    run(source, tmp_path / "clean")
    assert files(out) == files(tmp_path / "clean")


@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("then", ["the same", "another"])
def test_an_interruption_at_any_rename_changes_nothing(source, tmp_path, monkeypatch, overwriting, then):
    """Every step ends with a rename, so this stops behind each of them."""
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 100_000)
    replace = os.replace
    clean = tmp_path / "clean"
    seed = 1 if then == "the same" else 2
    run(source, clean, seed=seed)
    stopped_at, interrupted, calls = 0, True, 0

    def stopping(*args):
        nonlocal calls, interrupted
        if calls == stopped_at:
            interrupted = True
            raise KeyboardInterrupt
        calls += 1
        replace(*args)

    while interrupted:
        interrupted, calls = False, 0
        out = tmp_path / str(stopped_at)
        if overwriting:
            run(source, out)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping)
            try:
                run(source, out, seed=1, overwrite=overwriting)
            except KeyboardInterrupt:
                assert interrupted
        if interrupted or then == "the same":
            run(source, out, seed=seed, overwrite=overwriting)
            assert files(out) == files(clean), stopped_at
        stopped_at += 1
    assert stopped_at > 30


def test_what_is_done_is_not_done_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 25_000)
    read, calls = prepare_module.read_unit, []

    def stopping(unit, report):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(unit.number)
        return read(unit, report)

    monkeypatch.setattr(prepare_module, "read_unit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    units = tmp_path / "out" / ".prepare" / "units"
    times = {path: path.stat().st_mtime_ns for path in units.iterdir()}
    assert len(times) == 4 * 3
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    assert calls == [3, 4, 5]
    assert {path: path.stat().st_mtime_ns for path in times} == times


KILLED = """
import sys, blt_titan.data.sources as sources
sources.UNIT_BYTES = 1 << 20
from scripts.prepare_data import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_and_repeats_nothing(tmp_path):
    """Killed with its workers in the midst, again and again, and started anew; until a run comes through."""
    (tmp_path / "killed.py").write_text(KILLED)
    settings = ["--source", "python-stdlib", "--validation-fraction", "0.05", "--shard-bytes", "2MB", "--no-progress"]

    def start(out: str, workers: int) -> subprocess.Popen:
        command = [sys.executable, str(tmp_path / "killed.py"), *settings, "--out", str(tmp_path / out)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen([*command, "--workers", str(workers)], env=environment, stdout=subprocess.DEVNULL)

    began = time.perf_counter()
    assert start("clean", 1).wait() == 0
    whole_s = time.perf_counter() - began
    rng = np.random.default_rng(0)
    kills, finished = 0, set()
    while True:
        process = start("out", int(rng.integers(1, 3)))
        try:
            assert process.wait(timeout=whole_s * rng.uniform(0.3, 0.9)) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        done = {(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out/.prepare").rglob("*.done.json")}
        assert finished <= done or not (tmp_path / "out/.prepare/units").exists(), "what was done stays as it is"
        finished = done
    print(f"{kills} kills")
    assert kills >= 2
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_one_run_at_a_time(source, tmp_path):
    with (
        prepare_module._locked(tmp_path / "out" / ".prepare"),
        pytest.raises(DataError, match="another process is preparing this data set"),
    ):
        run(source, tmp_path / "out")


def test_leftovers_of_another_run_are_removed(source, tmp_path):
    out, clean = tmp_path / "out", tmp_path / "clean"
    run(source, clean)
    (out / ".prepare" / "units").mkdir(parents=True)
    for name in ("plan.json", "units/00000.done.json", "units/00000.text.tmp"):
        (out / ".prepare" / name).write_bytes(b'{"digest": "of another run"}')
    (out / "manifest.json.installing.partial").write_bytes(b"half")
    run(source, out)
    assert files(out) == files(clean)


def test_a_full_disk_is_one_sentence_and_what_was_done_stays(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 25_000)
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left on device.*free some space.*goes on where it stopped"):
            run(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]
    assert [path.name for path in (tmp_path / "out/.prepare/units").glob("*.done.json")] == ["00000.done.json"]
    run(source, tmp_path / "out")
    run(source, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_a_worker_that_is_killed_is_one_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 25_000)
    monkeypatch.setattr(prepare_module, "read_unit", die)
    with pytest.raises(DataError, match=r"a worker process was killed.*start again to go on"):
        run(source, tmp_path / "out", workers=2)


def die(unit, report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_records_that_cannot_be_used(tmp_path):
    """By default the first ends the work; else each is counted, and the first are named."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": \n{"body": "x"}\n{"text": ""}\n')
    (tmp_path / "source" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n' * 100)[:-9])
    (tmp_path / "source" / "c.txt").write_bytes(b"three")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON.*--on-error skip"):
        run(tmp_path / "source", tmp_path / "out")
    with pytest.raises(DataError, match=r"on_error is 'ignore'; it may be 'stop' or 'skip'"):
        run(tmp_path / "source", tmp_path / "out", on_error="ignore")
    manifest = run(tmp_path / "source", tmp_path / "out", on_error="skip", validation_fraction=0).manifest
    assert {b"one", b"three"} <= set(texts(tmp_path / "out", "train").values())
    assert manifest.counts.skipped_records == 3
    assert manifest.counts.empty_documents_left_out == 1
    [counted] = manifest.sources
    assert (counted.source, counted.skipped_records) == (str(tmp_path / "source"), 3)
    assert counted.documents == manifest.counts.documents
    assert [message.removeprefix(f"{tmp_path}/source/").split(":")[0] for message in manifest.skipped] == [
        "a.jsonl, line 2",
        "a.jsonl, line 3",
        f"b.jsonl.gz, after line {counted.documents - 2}",
    ]
    assert read_manifest(tmp_path / "out") == manifest


def test_hard_bytes_survive(tmp_path):
    """A line of 50 MB, NUL, CRLF, invalid UTF-8, emoji, no final newline."""
    long = "😀 é\n" * 6_500_000
    assert len(long.encode()) > 50e6
    (tmp_path / "source").mkdir()
    hard = {"nul": "\0a\0", "crlf": "a\r\nb\r\n", "emoji": "😀"}
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in [*hard.values(), long]]
    (tmp_path / "source" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "source" / "raw.txt").write_bytes(bytes(range(256)))
    run(tmp_path / "source", tmp_path / "out", validation_fraction=0, shard_bytes=2**30)
    assert set(texts(tmp_path / "out", "train").values()) == {
        *(text.encode() for text in [*hard.values(), long]),
        bytes(range(256)),
    }


def test_an_object_store_is_written_and_overwritten(source, tmp_path):
    fs = fsspec.filesystem("memory")
    settings = {"work": tmp_path / "work"}
    with pytest.raises(DataError, match=r"memory://out: is not on this machine, so name a directory.*--work"):
        run(source, "memory://out")
    assert not run(source, "memory://out", **settings).already_done
    run(source, tmp_path / "out")
    expected = files(tmp_path / "out")
    assert {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find("/out")} == expected
    assert run(source, "memory://out", **settings).already_done
    with pytest.raises(DataError, match=r"memory://out/manifest\.json: made with other settings \(seed 0 there, 1 now"):
        run(source, "memory://out", seed=1, **settings)
    fs.rm_file("/out/train-00000.arrow")
    with pytest.raises(DataError, match=r"train-00000\.arrow: no such file, .*--overwrite"):
        run(source, "memory://out", **settings)
    run(source, "memory://out", seed=1, shard_bytes=2**30, overwrite=True, **settings)
    assert len(fs.find("/out")) == 5
    fs.rm_file("/out/validation-00000.arrow")  # gone already when it is replaced
    run(source, "memory://out", seed=1, validation_fraction=0, overwrite=True, **settings)
    assert {path.rpartition("/")[2] for path in fs.find("/out")} == {
        MANIFEST_NAME,
        *parse_manifest(fs.cat_file("/out/manifest.json"), "").file_names(),
    }
    assert not list((tmp_path / "work").iterdir())


def test_what_else_is_in_the_working_directory_stays(source, tmp_path):
    (tmp_path / "work" / "sub").mkdir(parents=True)
    (tmp_path / "work" / "thesis.tex").write_bytes(b"mine")
    run(source, tmp_path / "out", work=tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["sub", "thesis.tex"]


def test_an_install_that_was_interrupted_is_not_taken_for_another(source, tmp_path, monkeypatch):
    """Killed while it moved files; then the target is removed, or another is named, with the same working directory."""
    replace = os.replace

    def stopping(path, target):
        if str(target).endswith("train-00001.arrow") and Path(target).parent.name == "out":
            raise KeyboardInterrupt
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", work=tmp_path / "work")
    assert (tmp_path / "out" / "train-00000.arrow").exists()
    run(source, tmp_path / "other", work=tmp_path / "work")
    run(source, tmp_path / "clean")
    assert files(tmp_path / "other") == files(tmp_path / "clean")
    (tmp_path / "out" / "train-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"out/train-00000\.arrow: was moved there by a run that was interrupted, "):
        run(source, tmp_path / "out", work=tmp_path / "work")


def test_what_was_replaced_goes_even_if_its_removal_was_interrupted(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(source, out)
    remove, calls = LocalDestination.remove, []

    def stopping(self, name):
        if name.endswith(".arrow"):
            calls.append(name)
            if len(calls) == 2:
                raise KeyboardInterrupt
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalDestination, "remove", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, shard_bytes=2**30, overwrite=True)
    assert (out / calls[1]).exists()
    assert (out / ".prepare").exists()
    assert run(source, out, shard_bytes=2**30).already_done
    run(source, tmp_path / "clean", shard_bytes=2**30)
    assert files(out) == files(tmp_path / "clean")


def test_a_working_directory_on_another_disk(source, tmp_path, monkeypatch):
    replace = os.replace

    def across(path, target):
        if Path(target).parent.name == "out" and Path(path).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(path, target)

    run(source, tmp_path / "clean")
    monkeypatch.setattr(os, "replace", across)
    run(source, tmp_path / "out", work=tmp_path / "work")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


@pytest.mark.slow
def test_ctrl_c_stops_workers_too(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), "--source", "python-stdlib", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*command, "--workers", "2"], env=environment, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    while not list(tmp_path.glob("out/.prepare/units/*.done.json")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "prepare_data: stopped; the same command goes on from here"
    assert "Traceback" not in said
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_large_file_of_lines_gives_the_same_in_parts(tmp_path, monkeypatch):
    """On one worker and on two; the lines before a part are counted once."""
    lines = [json.dumps({"text": "x" * (37 * i % 300) + str(i)}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:50]) + "\n")
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    settings = {"validation_fraction": 0.2, "seed": 0, "progress": False, "shard_bytes": 8000}
    prepare(sources, tmp_path / "whole", **settings)
    monkeypatch.setattr(sources_module, "SPLIT_BYTES", 5000)
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 5000)
    for workers in (1, 2):
        prepare(sources, tmp_path / str(workers), workers=workers, **settings)
        assert files(tmp_path / str(workers)) == files(tmp_path / "whole")


def test_an_interrupted_upload_goes_on(source, tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    run(source, tmp_path / "out")
    put, sent = type(fs).put_file, []

    def stopping(self, path, target, **options):
        if len(sent) == 3:
            raise ConnectionError("the network is gone")
        sent.append(target)
        put(self, path, target, **options)

    for seed in (1, 0):  # what another run sent is removed
        sent.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(fs), "put_file", stopping)
            with pytest.raises(DataError, match="the network is gone"):
                run(source, "memory://upload", work=tmp_path / "work", seed=seed)
    run(source, "memory://upload", work=tmp_path / "work")
    assert {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find("/upload")} == files(tmp_path / "out")


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
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]


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
        {"workers": 0},
        {"memory_bytes": 2**20},
        {"max_record_bytes": 0},
    ],
)
def test_settings_out_of_range_are_refused(source, tmp_path, settings):
    (name,) = settings
    with pytest.raises(DataError, match=f"{name.removesuffix('_bytes')}.* is .*; it may be"):
        run(source, tmp_path / "out", **settings)


def test_sources_that_cannot_work_are_refused(source, tmp_path):
    with pytest.raises(DataError, match="lies inside the source"):
        run(source, source / "out")
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(DataError, match="nothing: no documents"):
        run(empty, tmp_path / "out")
    with pytest.raises(DataError, match=r"lies inside the source.*--work"):
        run(source, tmp_path / "out", work=source / "work")
    run(source, source.parent / "below" / "out")
    with pytest.raises(DataError, match=r"manifest\.json: is a source, and lies in what this run writes"):
        run(f"{source.parent}/below/**", source.parent / "below" / "out", overwrite=True)
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
