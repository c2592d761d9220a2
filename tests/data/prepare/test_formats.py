"""Every format gives back the bytes that were put in, and names what is wrong with a record."""

import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pyarrow as pa
import pytest

from blt_titan.data.prepare import raw_records
from blt_titan.data.prepare.extents import Document, Problem
from tests.helpers.file_texts import TEXTS, items_of, texts_of


def jsonl(texts: list[str], *, final_newline: bool = True) -> bytes:
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    return ("\n".join(lines) + "\n" * final_newline).encode()


class _Kept(io.BytesIO):
    def close(self) -> None:
        self.kept = self.getvalue()
        super().close()


def zstd(content: bytes) -> bytes:
    kept = _Kept()
    with pa.CompressedOutputStream(kept, "zstd") as stream:
        stream.write(content)
    return kept.kept


@pytest.mark.parametrize("final_newline", [True, False])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("jsonl", bytes),
        ("ndjson", bytes),
        ("jsonl.gz", gzip.compress),
        ("jsonl.zst", zstd),
        ("json.gz", gzip.compress),
        ("jsonl.bz2", bz2.compress),
        ("ndjson.xz", lzma.compress),
    ],
)
def test_lines(tmp_path, suffix, compress, final_newline):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(compress(jsonl(TEXTS, final_newline=final_newline)))
    expected = [Document(f"a.{suffix}#L{i + 1}", text.encode()) for i, text in enumerate(TEXTS)]
    assert items_of(path) == expected


COMPRESS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_joined_archives_and_one_without_a_final_newline(tmp_path, suffix):
    path, compress = tmp_path / f"a.jsonl.{suffix}", COMPRESS[suffix]
    path.write_bytes(compress(jsonl(["a", "b"], final_newline=False)) + compress(jsonl(["c"])) + compress(jsonl(["d"])))
    assert items_of(path) == [
        Document(f"{path.name}#L1", b"a"),
        Document(f"{path.name}#L2", b"b"),
        Document(f"{path.name}#L2.2", b"c"),
        Document(f"{path.name}#L3", b"d"),
    ]


def test_details_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "with a byte order mark"}\r\n'
        b"\n  \r\n"
        b'{"id": 1, "text": "caf\\u00e9 \xc3\xa9 \\n\\u0000"}\r\n'
        b'{"text": "caf\xe9 \\ud83d\\ude00"}\n'
        b'{"text": "\xff\\\\udce9"}\n'
        b'{"text": "no newline at the end"}'
    )
    assert items_of(path) == [
        Document("a.jsonl#L1", b"with a byte order mark"),
        Document("a.jsonl#L4", "café é \n\0".encode()),
        Document("a.jsonl#L5", b"caf\xe9 \xf0\x9f\x98\x80"),
        Document("a.jsonl#L6", b"\xff\\udce9"),
        Document("a.jsonl#L7", b"no newline at the end"),
    ]


def test_all_bytes_between_quotation_marks_survive(tmp_path):
    """Bytes from 0x80 on, in any order; below that, JSON has its own rules."""
    text = np.random.default_rng(0).integers(128, 256, 5000, np.uint8).tobytes()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + text + b'"}\n')
    assert texts_of(tmp_path / "a.jsonl") == [text]


def test_the_text_column_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": 1, "content": "yes"}\n')
    assert texts_of(path, text_column="content") == [b"yes"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b'{"text": "a"} {"text": ', "not JSON"),
        (b'{"text": "a"} 3', "not JSON"),
        (b'{"text": "\xe9 \\udce9"}', "neither valid UTF-8 nor without half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "expected an object with a key 'text', got an array"),
        (b'{"content": "x"}', "no key 'text' among ['content']"),
        (b'{"text": 3}', "'text' is a number, expected a string"),
        (b'{"text": null}', "'text' is null, expected a string"),
        (b'{"text": "\\ud800"}', "'text' has no UTF-8 form"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "longer than 150000 bytes"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "after"}')
    before, problem, after = items_of(path, max_record_bytes=150_000)
    assert (before, after) == (Document("a.jsonl#L1", b"fine"), Document("a.jsonl#L4", b"after"))
    assert isinstance(problem, Problem)
    assert problem.message.startswith(f"{path}, line 3: {message}")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("cut", [1, 20, 2000])
def test_a_truncated_archive_is_named(tmp_path, suffix, cut):
    rng = np.random.default_rng(0)
    path, compress = tmp_path / f"a.jsonl.{suffix}", COMPRESS[suffix]
    path.write_bytes(compress(jsonl([rng.bytes(300).hex() for _ in range(100)]))[:-cut])
    *documents, problem = items_of(path)
    assert all(isinstance(document, Document) for document in documents)
    assert isinstance(problem, Problem)
    assert f"{path}, after line {len(documents)}: the compressed data is truncated or damaged" in problem.message


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_little_that_goes_before_a_truncation_is_lost(tmp_path, compress):
    rng = np.random.default_rng(0)
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    path.write_bytes(compress(jsonl([rng.bytes(300).hex() for _ in range(5000)]))[:-9])
    *documents, _ = items_of(path)
    assert len(documents) > 4700


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_zeros_after_an_archive_are_nothing(tmp_path, suffix):
    """As tape has them."""
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(COMPRESS[suffix](jsonl(["a"])) + bytes(512))
    assert texts_of(tmp_path / f"a.jsonl.{suffix}") == [b"a"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_no_archive_is_named(tmp_path, suffix):
    """Wholly, or behind one: nothing is dropped."""
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(COMPRESS[suffix](jsonl(["a"])) + b"no archive")
    *_, problem = items_of(tmp_path / f"a.jsonl.{suffix}")
    assert "the compressed data is truncated or damaged" in str(problem)
    (tmp_path / f"b.txt.{suffix}").write_bytes(b"no archive")
    [problem] = items_of(tmp_path / f"b.txt.{suffix}")
    assert f"b.txt.{suffix}: the compressed data is truncated or damaged" in str(problem)
    for name in (f"c.jsonl.{suffix}", f"c.txt.{suffix}"):
        (tmp_path / name).write_bytes(b"")
        [problem] = items_of(tmp_path / name)
        assert f"{name}: is empty, which no compressed file is" in str(problem)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_text(tmp_path, suffix):
    text = np.random.default_rng(0).bytes(200_000)
    (tmp_path / f"a.txt.{suffix}").write_bytes(COMPRESS[suffix](text[:90_000]) + COMPRESS[suffix](text[90_000:]))
    assert items_of(tmp_path / f"a.txt.{suffix}") == [Document(f"a.txt.{suffix}", text)]
    [problem] = items_of(tmp_path / f"a.txt.{suffix}", max_record_bytes=199_999)
    assert "more than 199999 bytes" in str(problem)


WORDS = b"a text of some words, as records hold them"


RECORDS = {
    "lines.json": b'{"text": "a"}\n{"text": "b"}\n',
    "of another key.json": b'\n{"body": "a"}\r\n{"body": "b"}',
    "lines": b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}',
    "one is damaged.txt": b'{"text": "a"}\n{"text": "b"}\n{"tex\n' * 3 + b'{"text": "c"}\n' * 7,
    "pretty.json": b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n',
    "array.json": b'[\n{"text": "%b"},\n{"text": "%b"}\n]\n' % (WORDS, WORDS),
    "not English.json": json.dumps([{"id": 1, "text": "\u00e4\u00f6\u00fc\u00df " * 9}], ensure_ascii=False).encode(),
    "in an object.json": b'{"version": 1, "rows": [{"text": "%b"}]}' % WORDS,
    "columns.json": b'{"id": [1, 2], "text": ["%b", "%b"]}' % (WORDS, WORDS),
    "one.json": json.dumps({"id": 1, "text": "a long text of some words"}).encode(),
    "table.csv": b'id,"text"\r\n1,a\r\n',
    "table.tsv": b"text\tid\na\t1\n",
    "table": b"PAR1\0\0",
    "table.ipc.txt": b"ARROW1\0\0",
}


TEXT_OF_JSON = {
    "menu.json": b'{"sidebar": [{"text": "Intro", "link": "/"}, {"text": "Guide", "link": "/guide"}]}',
    "links.json": b'[{"text": "Guide", "link": "/guide"}]',
    "buttons.json": b'{"buttons": [{"text": "OK", "id": 1}], "version": 1}',
    "words of a version.json": b'{"version": 1, "text": ["a", "b"], "more": "than that"}',
    "package.json": b'{\n  "name": "x",\n  "files": [{"name": "y"}, {"name": "z"}]\n}\n',
    "words.json": b'{"text": "Text", "button": "Button", "cancel": "Cancel"}',
    "objects.json": b'[{"name": "x"}, {"name": "y"}]',
    "strings.json": b'["text", "b"]',
    "lists.txt": b"[1]\n[2]\n",
    "braces.c": b"{ int text; }\n{ int b; }\n",
    "readme.md": b'# Example\n\nTwo records:\n\n{"text": "a"}\n{"text": "b"}\n\nand so on.\n',
    "deep.json": b"[" * 100_000,
    "table.csv": b"id,body\n1,a\n",
}


def test_records_are_not_read_as_text(tmp_path):
    """One by one, as a user names them, and in a tree; with as_text they are what they look like."""
    for name, content in RECORDS.items():
        (tmp_path / name).write_bytes(content)
        for compressed in ("", ".gz"):
            if compressed and name.endswith(".json"):
                continue  # .json.gz is always read as lines
            path = tmp_path / f"{name}{compressed}"
            path.write_bytes(gzip.compress(content) if compressed else content)
            [problem] = items_of(path)
            assert isinstance(problem, Problem), name
            assert problem.message.startswith(f"{path}: ")
            assert problem.message.endswith(" with --as-text")
            assert texts_of(path, as_text=True) == [content]
            if compressed:
                path.unlink()
    assert {type(item) for item in items_of(tmp_path)} == {Problem}
    (tmp_path / "table").unlink()
    assert sorted(texts_of(tmp_path, as_text=True)) == sorted(RECORDS[name] for name in RECORDS if name != "table")


def test_the_text_column_tells_records(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"body": "%b"}]' % WORDS)
    (tmp_path / "b.csv").write_bytes(b"id;body\n1;a\n")
    assert len(texts_of(tmp_path)) == 2
    assert {type(item) for item in items_of(tmp_path, text_column="body")} == {Problem}
    # A file that the user names is no part of a source tree.
    assert "looks like records of JSON" in str(items_of(tmp_path / "a.json"))


def test_documents_of_json_are_texts(tmp_path):
    for name, content in TEXT_OF_JSON.items():
        (tmp_path / name).write_bytes(content)
    assert sorted(texts_of(tmp_path)) == sorted(TEXT_OF_JSON.values())


def test_a_compressed_file_that_is_not_called_so_is_named(tmp_path):
    """In a tree it is one of many that are not text."""
    for suffix, compress in COMPRESS.items():
        path = tmp_path / suffix
        path.write_bytes(compress(b"text"))
        assert "is compressed by" in str(items_of(path))
        assert texts_of(path, as_text=True) == [path.read_bytes()]


def test_a_text_file_that_is_too_long_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1001)
    [problem] = items_of(tmp_path / "a.txt", max_record_bytes=1000)
    assert "a.txt: more than 1000 bytes; raise --max-record-bytes" in str(problem)


def test_a_text_that_begins_with_the_letters_of_bzip2_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"BZhu wrote this.")
    assert texts_of(tmp_path / "a.txt") == [b"BZhu wrote this."]


def test_of_a_large_document_the_beginning_tells_records(tmp_path, monkeypatch):
    """To parse it whole would take many times its bytes."""
    monkeypatch.setattr(raw_records, "_MOST_PARSED_BYTES", 4096)
    rows = b",\n".join([b'{"text": "%b"}' % WORDS] * 1000)
    for name, content in {"array": b"[" + rows + b"]", "object": b'{"rows": [' + rows + b"]}"}.items():
        (tmp_path / name).write_bytes(content)
        assert "looks like records of JSON" in str(items_of(tmp_path / name)), name
    for name, content in {
        "lists": b"[" + b", ".join([b"[]"] * 10_000) + b"]",
        "menu": b"[" + b", ".join([b'{"text": "Guide", "link": "/guide"}'] * 1000) + b"]",
    }.items():
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    assert len(texts_of(tmp_path / "tree")) == 2
