import bz2
import gzip
import json
import lzma
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt_titan.data.prepare import sources as module
from blt_titan.data.prepare.extents import Binary, Document, Extent
from blt_titan.data.prepare.sources import group, list_extents, resolve_sources
from blt_titan.data.prepare.work import count_newlines
from blt_titan.data.store.errors import DataError
from tests.helpers.source_texts import passed_over, read, texts_of


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
        "says it is text.txt": b"\0",
        "sub/a": b"a",
    }
    items = read(list_extents(resolve_sources([tmp_path])))
    assert [item for item in items if isinstance(item, Binary)] == [Binary(str(tmp_path / "early NUL"))]
    assert Document("empty", b"") in items


@pytest.fixture
def linked(tmp_path) -> Path:
    """A tree with links of every kind, next to a folder that some lead to."""
    tree, other = tmp_path / "tree", tmp_path / "other"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "a.txt").write_bytes(b"a")
    other.mkdir()
    (other / "b.txt").write_bytes(b"b")
    for link, to in {
        "again.txt": "sub/a.txt",
        "sub/loop": ".",
        "sub/up": "../..",
        "sub/self.txt": "self.txt",
        "gone.txt": "/nowhere/x.txt",
        "outside.txt": "../other/b.txt",
        "more": "../other",
    }.items():
        (tree / link).symlink_to(to)
    os.link(tree / "sub" / "a.txt", tree / "sub" / "hard.txt")
    return tree


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*"])
def test_trees_and_patterns_take_each_real_file_once_and_name_other_links(linked, pattern):
    assert texts_of(f"{linked}{pattern}") == {"sub/a.txt": b"a", "outside.txt": b"b"}
    assert passed_over(f"{linked}{pattern}") == {
        f"{linked}/again.txt": "repeated_files",
        f"{linked}/sub/hard.txt": "repeated_files",
        f"{linked}/sub/loop": "link_cycles",
        f"{linked}/sub/up": "link_cycles",
        f"{linked}/sub/self.txt": "link_cycles",
        f"{linked}/gone.txt": "dangling_links",
        f"{linked}/more": "directory_links",
    }


def test_cycles_are_not_gone_through(tmp_path):
    """Each of the links doubles what a walk along them finds, forty times."""
    (tmp_path / "a.txt").write_bytes(b"a")
    for name in ("l", "m"):
        (tmp_path / name).symlink_to(".")
    assert texts_of(f"{tmp_path}/**/*.txt") == {"a.txt": b"a"}
    assert passed_over(f"{tmp_path}/**/*.txt") == dict.fromkeys([f"{tmp_path}/l", f"{tmp_path}/m"], "link_cycles")


def test_a_link_that_a_pattern_names_is_followed_and_no_other(linked):
    assert texts_of(f"{linked}/more/*.txt") == {"b.txt": b"b"}
    assert texts_of(f"{linked}/*/?.txt") == {"sub/a.txt": b"a"}
    assert passed_over(f"{linked}/*/?.txt") == {f"{linked}/more": "directory_links"}
    with pytest.raises(
        DataError, match=r"no documents: .*more is a link to the directory \.\./other, and such are not"
    ):
        list_extents(resolve_sources([f"{linked}/m*/b.txt"]))


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()

    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    for name in (tmp_path, f"{tmp_path}/**/*.txt"):
        with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
            list_extents(resolve_sources([name]))


def test_a_relative_pattern_is_relative_to_the_folder_whatever_its_name(tmp_path, monkeypatch):
    for name in ("w[1]", "w1"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.txt").write_bytes(name.encode())
    monkeypatch.chdir(tmp_path / "w[1]")
    for name in ("sub/*.txt", "**/*.txt", "../w[[]1]/sub/*.txt", "sub"):
        assert list(texts_of(name).values()) == [b"w[1]"], name
    assert texts_of("*/*.txt") == {"sub/a.txt": b"w[1]"}
    assert texts_of("../w[1]/*/*.txt") == {"w1/sub/a.txt": b"w1"}


@pytest.mark.parametrize(
    "names",
    [
        ["d", "d/*.txt"],
        ["d", "d/a.txt"],
        ["d", "."],
        ["d/*.txt", "d/a*"],
        ["d/a.txt", "link.txt"],
        ["d", "link.txt"],
        ["hard.txt", "d/a.txt"],
        ["file://{}/d", "d"],
    ],
)
def test_sources_that_hold_the_same_file_are_refused(tmp_path, monkeypatch, names):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes(b"a")
    (tmp_path / "link.txt").symlink_to("d/a.txt")
    os.link(tmp_path / "d" / "a.txt", tmp_path / "hard.txt")
    monkeypatch.chdir(tmp_path)
    names = [name.format(tmp_path) for name in names]
    for given in (names, names[::-1]):
        with pytest.raises(DataError, match=r"in the source .* in the source .* taken twice|is given twice"):
            list_extents(resolve_sources(given))


def test_compressed_texts_are_read_and_archives_named(tmp_path):
    line = b'{"text": "a"}\n'
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    for suffix, pack in compress.items():
        (tmp_path / f"a.txt.{suffix}").write_bytes(pack(b"text " + suffix.encode()))
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(line))
        (tmp_path / f"binary.{suffix}").write_bytes(pack(b"\0"))
    for name in ("b.tar.gz", "c.zip", "d.tgz", "e.txt.lz4"):
        (tmp_path / name).write_bytes(b"\0")
    expected = {f"a.txt.{suffix}": f"text {suffix}".encode() for suffix in compress}
    assert texts_of(tmp_path) == expected | {f"a.jsonl.{suffix}#L1": b"a" for suffix in compress}
    assert passed_over(tmp_path) == {
        f"{tmp_path}/{name}": "archives" for name in ("b.tar.gz", "c.zip", "d.tgz", "e.txt.lz4")
    }
    kinds = Counter(type(item) for item in read(list_extents(resolve_sources([tmp_path]))))
    assert kinds[Binary] == 3
    assert texts_of(tmp_path / "binary.xz") == {"binary.xz": b"\0"}


def test_a_query_in_a_name_hides_no_suffix(tmp_path):
    (tmp_path / "a.jsonl?download=true").write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.jsonl.gz?raw=1").write_bytes(gzip.compress(b'{"text": "c"}\n'))
    (tmp_path / "why?.txt").write_bytes(b"d")
    assert sorted(texts_of(tmp_path).values()) == [b"a", b"b", b"c", b"d"]
    assert sorted(texts_of(tmp_path / "a.jsonl?download=true").values()) == [b"a", b"b"]


def test_a_saved_data_set_is_its_data_files(tmp_path):
    """Here and on an object store; next to other files, a map's cache among them."""
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_dict({"text": ["a", "b", "c"]})
    saved.save_to_disk(tmp_path / "tree" / "saved", num_shards=2)
    (tmp_path / "tree" / "saved" / "cache-1.arrow").write_bytes(b"no data")
    (tmp_path / "tree" / "state.json").write_bytes(b'{"kept": true}')
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "dict")
    DatasetDict({"train": saved}).save_to_disk(tmp_path / "one")
    files = ["data-00000-of-00002.arrow#R1", "data-00000-of-00002.arrow#R2", "data-00001-of-00002.arrow#R1"]
    expected = dict(zip(files, [b"a", b"b", b"c"], strict=True))
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "tree"), "/saved/tree", recursive=True)
    fs.put(str(tmp_path / "dict"), "/saved/dict", recursive=True)
    for root in (tmp_path, "memory://saved"):
        for name in ("", "/*", "/**"):
            assert texts_of(f"{root}/tree/saved{name}") == expected
        assert texts_of(f"{root}/tree") == {
            "state.json": b'{"kept": true}',
            **{f"saved/{name}": text for name, text in expected.items()},
        }
        with pytest.raises(DataError, match="dict: holds the splits train, test of a saved DatasetDict; name those"):
            list_extents(resolve_sources([f"{root}/dict"]))
        assert sorted(texts_of(f"{root}/dict/test").values()) == [b"a", b"b", b"c"]
    assert sorted(texts_of(tmp_path / "one").values()) == [b"a", b"b", b"c"]
    (tmp_path / "tree" / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"names the data file data-00001-of-00002\.arrow, which is not there"):
        list_extents(resolve_sources([tmp_path / "tree"]))


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
    with pytest.raises(DataError, match="a source is empty"):
        resolve_sources([""])
    with pytest.raises(DataError, match=r"xxx: cannot be read \(File name too long\)"):
        resolve_sources([tmp_path / ("x" * 300)])
    with pytest.raises(DataError, match="is no path"):
        resolve_sources(["a\0b"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: is neither a file nor a directory"):
        resolve_sources([tmp_path / "pipe"])


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
