"""Every format gives back the bytes that were put in, and names what is wrong with a record."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt_titan.data.formats import Binary, Document, Problem, read_extent
from blt_titan.data.sources import list_extents, resolve_sources

TEXTS = ["plain", "", "é 😀 \u2028 inside", "NUL \0 inside", "CRLF\r\n", "x" * 3000, '"quoted" \\ {"text": "no"}']


def items_of(
    path: Path, text_column: str = "text", max_record_bytes: int = 1 << 20
) -> list[Document | Problem | Binary]:
    extents = list_extents(resolve_sources([path]))
    return [i for e in extents for i in read_extent(e, text_column=text_column, max_record_bytes=max_record_bytes)]


def texts_of(path: Path, **options) -> list[bytes]:
    items = items_of(path, **options)
    assert not [item for item in items if isinstance(item, Problem)]
    return [item.text for item in items if isinstance(item, Document)]


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
    [("jsonl", bytes), ("ndjson", bytes), ("jsonl.gz", gzip.compress), ("jsonl.zst", zstd), ("json.gz", gzip.compress)],
)
def test_lines(tmp_path, suffix, compress, final_newline):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(compress(jsonl(TEXTS, final_newline=final_newline)))
    expected = [Document(f"a.{suffix}#L{i + 1}", text.encode()) for i, text in enumerate(TEXTS)]
    assert items_of(path) == expected


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_joined_archives_and_one_without_a_final_newline(tmp_path, compress):
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
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
        (b'["text"]', "expected an object with a key 'text', got list"),
        (b'{"content": "x"}', "no key 'text' among ['content']"),
        (b'{"text": 3}', "'text' is int, expected a string"),
        (b'{"text": null}', "'text' is NoneType, expected a string"),
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


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
@pytest.mark.parametrize("cut", [1, 20, 2000])
def test_a_truncated_archive_is_named(tmp_path, compress, cut):
    rng = np.random.default_rng(0)
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
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


def test_odd_archives(tmp_path):
    """Zeros after the end, as tape has them; and a file of nothing."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(["a"])) + bytes(512))
    assert texts_of(path) == [b"a"]
    for name in ("b.jsonl.gz", "b.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        [problem] = items_of(tmp_path / name)
        assert f"{name}: is empty, which no compressed file is" in str(problem)


def test_a_text_file_that_is_too_long_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1001)
    [problem] = items_of(tmp_path / "a.txt", max_record_bytes=1000)
    assert "a.txt: more than 1000 bytes; raise --max-record-bytes" in str(problem)


COLUMNS = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "binary": pa.array([text.encode() for text in TEXTS], pa.binary()),
    "string_view": pa.array(TEXTS, pa.string_view()),
}


def write_table(path: Path, table: pa.Table, how: str) -> None:
    if how == "parquet":
        pq.write_table(table, path, row_group_size=3)
    elif how == "arrow file":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("how", ["parquet", "arrow file", "arrow stream"])
def test_tables(tmp_path, how, kind):
    path = tmp_path / f"a.{how.split()[0]}"
    write_table(path, pa.table({"id": list(range(len(TEXTS))), "text": COLUMNS[kind]}), how)
    expected = [Document(f"{path.name}#R{i + 1}", text.encode()) for i, text in enumerate(TEXTS)]
    assert items_of(path) == expected


@pytest.mark.parametrize("how", ["parquet", "arrow file", "arrow stream"])
def test_a_string_that_is_not_utf8_stays_as_it_is(tmp_path, how):
    path = tmp_path / f"a.{how.split()[0]}"
    raw = pa.array([b"caf\xe9", b"\xff\0"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    write_table(path, pa.table({"text": strings}), how)
    assert texts_of(path) == [b"caf\xe9", b"\xff\0"]


def test_arrow_files_with_entropies_give_their_text(tmp_path):
    """The original project's: its entropies are of another model, and are left out."""
    table = pa.table({
        "sample_id": ["a", "b"],
        "text": ["one", "two"],
        "entropies": pa.array([[0.1, 0.2, 0.3]] * 2, pa.list_(pa.float16())),
    })  # fmt: skip
    write_table(tmp_path / "shard.chunk.0.arrow", table, "arrow file")
    assert texts_of(tmp_path / "shard.chunk.0.arrow") == [b"one", b"two"]


@pytest.mark.parametrize("how", ["parquet", "arrow file"])
def test_problems_of_tables(tmp_path, how):
    path = tmp_path / f"a.{how.split()[0]}"
    write_table(path, pa.table({"text": ["a", None, "b"]}), how)
    assert items_of(path) == [
        Document(f"{path.name}#R1", b"a"),
        Problem(f"{path}, row 2: 'text' is null, expected a string"),
        Document(f"{path.name}#R3", b"b"),
    ]
    [problem] = items_of(path, text_column="body")
    assert f"{path}: no column 'body' among ['text']" in str(problem)
    write_table(path, pa.table({"text": ["a", "x" * 1001, "b"]}), how)
    assert items_of(path, max_record_bytes=1000) == [
        Document(f"{path.name}#R1", b"a"),
        Problem(f"{path}, row 2: longer than 1000 bytes; raise --max-record-bytes, or split it"),
        Document(f"{path.name}#R3", b"b"),
    ]
    write_table(path, pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), how)
    [problem] = items_of(path)
    assert "several columns 'text' among ['text', 'text']" in str(problem)
    write_table(path, pa.table({"text": [1, 2]}), how)
    [problem] = items_of(path)
    assert "the column 'text' is int64, expected strings" in str(problem)
    path.write_bytes(path.read_bytes()[:-40])
    *_, problem = items_of(path)
    assert f"{path}: cannot be read as {how.split()[0]} from row 1 on" in str(problem)
