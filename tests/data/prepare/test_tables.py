"""Parquet and Arrow files as sources."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt_titan.data.prepare.extents import Document, Problem
from tests.helpers.file_texts import TEXTS, items_of, texts_of

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


def bytes_of_table(tmp_path: Path, how: str, texts: list[str]) -> bytes:
    write_table(tmp_path / "part", pa.table({"id": list(range(len(texts))), "text": texts}), how)
    return (tmp_path / "part").read_bytes()


def test_joined_arrow_streams_are_read_on(tmp_path):
    path = tmp_path / "a.arrow"
    one, two = (bytes_of_table(tmp_path, "arrow stream", texts) for texts in (["a", "b"], ["c"]))
    path.write_bytes(one + two + bytes(16))
    assert items_of(path) == [Document(f"a.arrow#R{i + 1}", text) for i, text in enumerate([b"a", b"b", b"c"])]
    path.write_bytes(one + b"more")
    *documents, problem = items_of(path)
    assert [document.text for document in documents] == [b"a", b"b"]
    assert f"{path}: the Arrow stream in it ends at byte {len(one)}, and 4 bytes follow that are no stream" in str(
        problem
    )
    path.write_bytes(one + two[:-20])
    assert isinstance(items_of(path)[-1], Problem)
    path.write_bytes(one + bytes_of_table(tmp_path, "arrow file", ["c"]))
    assert f"ends at byte {len(one)}, and" in str(items_of(path)[-1])


@pytest.mark.parametrize("lengths", [(3, 3), (3, 900), (900, 3)])
@pytest.mark.parametrize("how", ["parquet", "arrow file"])
def test_joined_files_of_tables_are_refused(tmp_path, how, lengths):
    """The offsets of the last file's end would be read in the first."""
    path = tmp_path / f"a.{how.split()[0]}"
    one, two = (bytes_of_table(tmp_path, how, [f"{n} {i}" for i in range(n)]) for n in lengths)
    path.write_bytes(one + two)
    assert any(isinstance(item, Problem) for item in items_of(path))
    if lengths == (3, 3):
        assert f"{path}: " in str(items_of(path)[-1])
        assert "take them apart" in str(items_of(path)[-1])


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


def test_an_arrow_file_whose_magic_is_padded_to_64_bytes_is_read(tmp_path):
    """As the writer of arrow-rs does; the format asks for 8."""
    content = bytes_of_table(tmp_path, "arrow file", ["a", "b"])
    path = tmp_path / "a.arrow"
    path.write_bytes(content[:8] + bytes(56) + content[8:])
    assert texts_of(path) == [b"a", b"b"]


def test_a_column_whose_name_is_not_utf8_is_none_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n")
    assert texts_of(tmp_path / "a.csv", text_column="\udcff") == [b"id,text\n1,a\n"]
