import gzip
import json
from pathlib import Path

import fsspec
import pytest

from blt_titan.commands.arguments import size
from blt_titan.commands.prepare import main
from blt_titan.data.prepare import checks, passes
from blt_titan.data.prepare import job as prepare_module
from blt_titan.data.prepare import plan as prepare_plan
from blt_titan.data.prepare import sources as sources_module
from blt_titan.data.prepare import work as prepare_work
from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import MANIFEST_NAME, parse_manifest, read_manifest
from blt_titan.data.store.shards import ShardSet
from tests.helpers.prepared import files, run, texts, write_source


@pytest.fixture
def source(tmp_path) -> Path:
    return write_source(tmp_path / "source")


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
    monkeypatch.setattr(checks, "least_memory_bytes", lambda _: 0)
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
    list_extents = passes.list_extents
    monkeypatch.setattr(passes, "list_extents", lambda sources, revisions: list_extents(sources, revisions)[::-1])
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
    hashes = prepare_work.keyed_hashes(5)
    for split in ("train", "validation"):
        ids = list(texts(out, split))
        assert ids == sorted(ids, key=lambda doc_id: int.from_bytes(hashes(doc_id.encode())[:8], "little"))


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


def test_what_is_passed_over_is_counted_and_named(source, tmp_path, caplog):
    run(source, tmp_path / "without")
    for name, to in {"loop": ".", "self": "self", "gone": "nowhere", "again": "1.txt", "out": tmp_path}.items():
        (source / name).symlink_to(to)
    (source / "a.zip").write_bytes(b"PK")
    for workers in (1, 2):
        out = tmp_path / f"{workers} workers"
        summary = run(source, out, workers=workers)
        assert texts(out, "train") == texts(tmp_path / "without", "train")
        counts = read_manifest(out).counts
        assert (counts.link_cycles, counts.dangling_links, counts.directory_links) == (3, 1, 0)
        assert (counts.repeated_files, counts.archives) == (1, 1)
        assert len(summary.manifest.skipped) == 6
        assert f"{source}/gone: is a link to nowhere, which is not there" in summary.manifest.skipped
        assert "passed over: 1 dangling links, 3 link cycles, 0 directory links, 1 repeated files, 1 arch" in str(
            summary
        )
    assert f"passed over: {source}/loop: is a link to ., which holds it" in caplog.messages
    # As data sets have it that were made before there were such counts.
    written = json.loads((out / MANIFEST_NAME).read_bytes())
    for kind in ("dangling_links", "link_cycles", "directory_links", "repeated_files", "archives"):
        del written["counts"][kind]
    (out / MANIFEST_NAME).write_text(json.dumps(written))
    assert run(source, out).already_done


def test_many_links_do_not_hide_a_record_that_was_skipped(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(120):
        (tmp_path / "source" / f"{number:03d}").symlink_to("nowhere")
    (tmp_path / "source" / "z.jsonl").write_text('{"text": "a"}\n{"text\n')
    manifest = run(tmp_path / "source", tmp_path / "out", on_error="skip").manifest
    assert (manifest.counts.skipped_records, manifest.counts.dangling_links) == (1, 120)
    assert "z.jsonl, line 2" in manifest.skipped[0]
    assert "000: is a link to nowhere" in manifest.skipped[1]


def test_a_source_of_nothing_but_links_says_so(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=r"no documents: .*/loop is a link to loop, which leads back to it"):
        run(tmp_path / "source", tmp_path / "out")


def test_records_are_taken_as_text_only_when_told(tmp_path, capsys):
    (tmp_path / "a.json").write_bytes(b'{"body": "a"}\n{"body": "b"}\n')
    command = ["--source", str(tmp_path / "a.json"), "--out", str(tmp_path / "out"), "--no-progress"]
    for options in ([], ["--text-column", "body"]):
        assert main([*command, *options]) == 2
        assert "a.json: looks like JSON lines; rename it to end in .jsonl" in capsys.readouterr().err
        assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    assert main([*command, "--as-text"]) == 0
    assert texts(tmp_path / "out", "train") == {"a.json": (tmp_path / "a.json").read_bytes()}
    assert read_manifest(tmp_path / "out").settings["as_text"] is True
    assert main(command) == 2
    assert "as_text True there, None now" in capsys.readouterr().err


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
    assert captured.err.startswith("blt-titan prepare: error: ")
    assert captured.err.count("\n") == 1
    assert main([*command, "--max-bytes", "3 apples"]) == 2
    assert "'3 apples' is not a size" in capsys.readouterr().err


def test_sizes():
    sizes = {"300": 300, "16KiB": 16384, "4MB": 4_000_000, "1GiB": 2**30, "2 tb": 2 * 10**12, "1.5k": 1500, "7B": 7}
    assert {text: size(text) for text in sizes} == sizes
