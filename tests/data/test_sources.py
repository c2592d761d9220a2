import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt_titan.data import sources as module
from blt_titan.data.errors import DataError
from blt_titan.data.formats import Binary, Document, Problem, read_extent
from blt_titan.data.prepare_work import count_newlines
from blt_titan.data.sources import HUB_PRESETS, Extent, group, list_extents, resolve_sources

MAX_RECORD_BYTES = 1 << 20


def read(extents: list[Extent]) -> list[Document | Problem | Binary]:
    return [item for e in extents for item in read_extent(e, text_column="text", max_record_bytes=MAX_RECORD_BYTES)]


def texts_of(*names: str | Path) -> dict[str, bytes]:
    items = read(list_extents(resolve_sources(names)))
    assert not [item for item in items if isinstance(item, Problem)]
    return dict(item for item in items if isinstance(item, Document) and item.text)


def test_a_directory_gives_its_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xff not UTF-8 \r\n")
    (tmp_path / "sub" / "a").write_bytes(b"a")
    (tmp_path / "__pycache__" / "c").write_bytes(b"c")
    (tmp_path / ".hidden" / "d").write_bytes(b"d")
    (tmp_path / ".e").write_bytes(b"e")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "early NUL").write_bytes(b"x" * 8191 + b"\0")
    (tmp_path / "late NUL").write_bytes(b"x" * 8192 + b"\0")
    (tmp_path / "says it is text.txt").write_bytes(b"\0")
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "one"}\n')
    (tmp_path / "link").symlink_to(tmp_path / "b.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert texts_of(tmp_path) == {
        "__pycache__/c": b"c",
        "b.txt": b"\xff not UTF-8 \r\n",
        "late NUL": b"x" * 8192 + b"\0",
        "lines.jsonl#L1": b"one",
        "link": b"\xff not UTF-8 \r\n",
        "says it is text.txt": b"\0",
        "sub/a": b"a",
    }
    items = read(list_extents(resolve_sources([tmp_path])))
    assert [item for item in items if isinstance(item, Binary)] == [Binary(str(tmp_path / "early NUL"))]
    assert Document("empty", b"") in items


def test_a_file_name_that_is_not_utf8_becomes_a_valid_id(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9", "wb") as file:
        file.write(b"x")
    assert texts_of(tmp_path) == {"caf\\xe9": b"x"}


def test_a_file_is_one_document_whatever_it_holds(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\0\xff")
    assert texts_of(path) == {"a.bin": b"\0\xff"}


def test_the_standard_library_is_python_files_only():
    extents = list_extents(resolve_sources(["python-stdlib"]))
    ids = {extent.doc_id for extent in extents}
    assert {"os.py", "json/decoder.py"} <= ids
    assert all(i.endswith(".py") for i in ids)
    assert not any(part in i for i in ids for part in ("site-packages", "dist-packages", "__pycache__"))
    [(_, text)] = read([extent for extent in extents if extent.doc_id == "os.py"])
    assert text == Path(os.__file__).read_bytes()


def test_several_sources_prefix_their_documents(tmp_path):
    for name in ("x/data", "y/data", "z"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_bytes(name.encode())
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "c"}')
    sources = [tmp_path / name for name in ("x/data", "y/data", "z", "c.jsonl")]
    expected = {
        f"{tmp_path}/x/data/a.txt": b"x/data",
        f"{tmp_path}/y/data/a.txt": b"y/data",
        "z/a.txt": b"z",
        "c.jsonl#L1": b"c",
    }
    assert texts_of(*sources) == expected
    assert texts_of(*reversed(sources)) == expected


def test_a_pattern_is_a_source(tmp_path):
    for name in ("a/1.jsonl", "a/b/2.jsonl", "c/3.jsonl", "c/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert texts_of(f"{tmp_path}/**/*.jsonl") == {
        "a/1.jsonl#L1": b"a/1.jsonl",
        "a/b/2.jsonl#L1": b"a/b/2.jsonl",
        "c/3.jsonl#L1": b"c/3.jsonl",
    }
    assert texts_of(f"{tmp_path}/[ac]/?.jsonl").keys() == {"a/1.jsonl#L1", "c/3.jsonl#L1"}
    with pytest.raises(DataError, match=r"\*\.zst: no documents: it holds no file"):
        list_extents(resolve_sources([f"{tmp_path}/*.zst"]))


def test_an_object_store_is_read_as_files_are(tmp_path):
    fs = fsspec.filesystem("memory")
    for name, content in {"a.txt": b"a", "sub/b.jsonl": b'{"text": "b"}', ".hidden/c.txt": b"c"}.items():
        fs.pipe_file(f"/store/{name}", content)
        (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / name).write_bytes(content)
    expected = {"a.txt": b"a", "sub/b.jsonl#L1": b"b"}
    assert texts_of("memory://store") == texts_of(tmp_path / "store") == expected
    assert texts_of("memory://store/**/*.jsonl") == {"sub/b.jsonl#L1": b"b"}
    assert texts_of("memory://store/a.txt") == {"a.txt": b"a"}
    with pytest.raises(DataError, match="memory://nowhere: no such file or directory there"):
        resolve_sources(["memory://nowhere"])
    with pytest.raises(DataError, match=r"nonsense://x: .*nonsense"):
        resolve_sources(["nonsense://x"])


@pytest.mark.parametrize("split_bytes", [7, 40, 100, 1000])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
def test_a_large_file_of_lines_is_read_in_parts(tmp_path, monkeypatch, split_bytes, ending):
    lines = [json.dumps({"text": "x" * (7 * i % 50) + str(i)}).encode() for i in range(40)]
    lines[11] = lines[20] = b""
    newline = ending or b"\n"
    (tmp_path / "a.jsonl").write_bytes(newline.join(lines) + ending)
    expected = texts_of(tmp_path / "a.jsonl")
    assert len(expected) == 38
    monkeypatch.setattr(module, "SPLIT_BYTES", split_bytes)
    extents = list_extents(resolve_sources([tmp_path / "a.jsonl"]))
    assert len(extents) == -(-(tmp_path / "a.jsonl").stat().st_size // split_bytes)
    newlines = [count_newlines(extent, lambda _: None) for extent in extents]
    found = read([replace(extent, first=sum(newlines[:i])) for i, extent in enumerate(extents)])
    assert dict(item for item in found if item.text) == expected


def test_a_large_parquet_file_is_read_by_row_groups(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": [str(i) * i for i in range(100)]}), tmp_path / "a.parquet", row_group_size=9)
    expected = texts_of(tmp_path / "a.parquet")
    assert len(expected) == 99
    monkeypatch.setattr(module, "SPLIT_BYTES", 600)
    assert len(list_extents(resolve_sources([tmp_path / "a.parquet"]))) > 3
    assert texts_of(tmp_path / "a.parquet") == expected


def test_small_extents_are_read_together(monkeypatch):
    monkeypatch.setattr(module, "UNIT_BYTES", 100)
    monkeypatch.setattr(module, "_LEAST_COST_BYTES", 0)
    sizes = [10, 80, 20, 300, 5, 5, 0, 1]
    units = group([Extent(0, "text", str(size), "", size, size) for size in sizes])
    assert [[extent.size_bytes for extent in unit] for unit in units] == [[10, 80], [20], [300], [5, 5, 0, 1]]
    # What is unknown, as of the hub, is read alone.
    assert len(group([Extent(0, "hub", "a", "", begin=i, end=3) for i in range(3)])) == 3


def test_a_data_set_of_the_hub_has_an_extent_for_each_file(tmp_path):
    """`datasets` takes a directory for a data set of the hub, and streams it in the same way."""
    expected = {}
    for number in range(3):
        texts = [f"{number} {row} é" for row in range(70)]
        pq.write_table(pa.table({"id": list(range(70)), "text": texts}), tmp_path / f"{number}.parquet")
        expected |= {f"{tmp_path}#{number}#R{row + 1}": text.encode() for row, text in enumerate(texts)}
    extents = list_extents(resolve_sources([f"hf:{tmp_path}"]))
    assert [(extent.begin, extent.end) for extent in extents] == [(0, 3), (1, 3), (2, 3)]
    assert texts_of(f"hf:{tmp_path}") == expected == texts_of(f"hf:{tmp_path}::train")
    [problem] = list(read_extent(extents[0], text_column="body", max_record_bytes=MAX_RECORD_BYTES))
    assert "no column 'body' among ['id', 'text']" in str(problem)
    for name, message in ((f"hf:{tmp_path}::test", "cannot be opened"), ("hf:a:b:c:d", "is hf:NAME, hf:NAME:CONFIG")):
        with pytest.raises(DataError, match=message):
            list_extents(resolve_sources([name]))


def test_a_bad_record_of_the_hub_is_named_and_the_rest_of_its_file_left(tmp_path):
    lines = ['{"text": "fine"}\n'] * 5 + ["{\n"] + ['{"text": "after"}\n'] * 5
    (tmp_path / "0.jsonl").write_text('{"text": "another"}\n')
    (tmp_path / "1.jsonl").write_text("".join(lines))
    first, *items = read(list_extents(resolve_sources([f"hf:{tmp_path}"])))
    assert first == Document(f"{tmp_path}#0#R1", b"another")
    problems = [item for item in items if isinstance(item, Problem)]
    assert len(problems) == 1
    assert problems[0].message.startswith(f"hf:{tmp_path}, file 1, after row ")


class _OfAStore(fsspec.spec.AbstractBufferedFile):
    """A file as the drivers of object stores have it: fetched by ranges, and no `readline` of bounded length."""

    def _fetch_range(self, start, end):
        return self.fs.cat_file(self.path, start=start, end=end)


def test_files_of_real_object_stores_are_read(monkeypatch):
    fs = fsspec.filesystem("memory")
    text = "".join(json.dumps({"text": "x" * i}) + "\n" for i in range(300))
    fs.pipe_file("/lines/a.jsonl", text.encode())
    fs.pipe_file("/lines/b.jsonl.gz", gzip.compress(text.encode()))
    with fs.open("/lines/c.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["x" * i for i in range(300)]}), file)
    expected = texts_of("memory://lines")
    assert len(expected) == 3 * 299

    def open_as_a_store(self, path, mode="rb", **_):
        return _OfAStore(self, path, mode, block_size=1000)

    monkeypatch.setattr(type(fs), "open", open_as_a_store)
    assert texts_of("memory://lines") == expected


def test_presets_name_data_sets_of_the_hub():
    sources = resolve_sources(list(HUB_PRESETS))
    assert [source.root.split(":")[0] for source in sources] == [
        "HuggingFaceFW/fineweb-edu",
        "HuggingFaceFW/fineweb-edu",
        "mlfoundations/dclm-baseline-1.0",
    ]
    assert len({source.setting for source in sources}) == 3


def test_a_source_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="nope: no such file or directory"):
        resolve_sources([tmp_path / "nope"])
    with pytest.raises(DataError, match="given twice"):
        resolve_sources([tmp_path / "a.txt", f"{tmp_path}/../{tmp_path.name}/a.txt"])
    with pytest.raises(DataError, match=r"a\.tar\.gz: \.gz files of this kind are not read"):
        resolve_sources([tmp_path / "a.tar.gz"])
    with pytest.raises(DataError, match="no source given"):
        resolve_sources([])


def test_a_file_that_changes_after_it_was_listed_is_noticed(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(b'{"text": "abc"}')
    changed, lines, gone = list_extents(resolve_sources([tmp_path]))
    (tmp_path / "a.txt").write_bytes(b"abcd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "abcd"}')
    (tmp_path / "c.txt").unlink()
    for extent in (changed, lines):
        with pytest.raises(DataError, match=r"\d+ bytes, 15 when it was listed"):
            read([extent])
    with pytest.raises(DataError, match=r"c\.txt: cannot be read"):
        read([gone])
