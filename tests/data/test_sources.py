import os
from pathlib import Path

import pytest

from blt_titan.data.errors import DataError
from blt_titan.data.sources import Listing, list_documents, resolve_sources


def listing_of(*names: str | Path, text_column: str = "text") -> Listing:
    return list_documents(resolve_sources(names), text_column=text_column)


def texts_of(*names: str | Path, text_column: str = "text") -> dict[str, bytes]:
    return {d.doc_id: d.read() for d in listing_of(*names, text_column=text_column).documents}


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
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "one"}\n')
    (tmp_path / "link").symlink_to(tmp_path / "b.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    listing = listing_of(tmp_path)
    assert {d.doc_id: d.read() for d in listing.documents} == {
        "__pycache__/c": b"c",
        "b.txt": b"\xff not UTF-8 \r\n",
        "late NUL": b"x" * 8192 + b"\0",
        "lines.jsonl#L1": b"one",
        "link": b"\xff not UTF-8 \r\n",
        "sub/a": b"a",
    }
    assert (listing.empty_documents, listing.binary_files) == (1, 1)


def test_a_file_name_that_is_not_utf8_becomes_a_valid_id(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9", "wb") as file:
        file.write(b"x")
    assert texts_of(tmp_path) == {"caf\\xe9": b"x"}


def test_a_file_is_one_document_whatever_it_holds(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\0\xff")
    assert texts_of(path) == {"a.bin": b"\0\xff"}


def test_the_standard_library_is_python_files_only():
    documents = listing_of("python-stdlib").documents
    ids = {d.doc_id for d in documents}
    assert {"os.py", "json/decoder.py"} <= ids
    assert all(i.endswith(".py") for i in ids)
    assert not any(part in i for i in ids for part in ("site-packages", "dist-packages", "__pycache__"))
    by_id = {d.doc_id: d for d in documents}
    assert by_id["os.py"].read() == Path(os.__file__).read_bytes()


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


def test_jsonl_lines_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "with a byte order mark"}\r\n'
        b"\n  \r\n"
        b'{"id": 1, "text": "caf\\u00e9 \xc3\xa9 \\n\\u0000"}\r\n'
        b'{"text": ""}\n'
        b'{"text": "no newline at the end \xe2\x80\xa8 inside"}'
    )
    listing = listing_of(path)
    assert {d.doc_id: d.read() for d in listing.documents} == {
        "a.jsonl#L1": b"with a byte order mark",
        "a.jsonl#L4": "café é \n\0".encode(),
        "a.jsonl#L6": "no newline at the end \u2028 inside".encode(),
    }
    assert listing.empty_documents == 1


def test_the_text_column_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": 1, "content": "yes"}\n')
    assert texts_of(path, text_column="content") == {"a.jsonl#L1": b"yes"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b'{"text": "caf\xe9"}', "not JSON .*utf-8"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "expected an object with a key 'text', got list"),
        (b'{"content": "x"}', r"no key 'text' among \['content'\]"),
        (b'{"text": 3}', "'text' is int, expected a string"),
        (b'{"text": null}', "'text' is NoneType, expected a string"),
        (b'{"text": "\\ud800"}', "'text' has no UTF-8 form"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {message}"):
        listing_of(path)


def test_a_source_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="nope: no such file or directory"):
        resolve_sources([tmp_path / "nope"])
    with pytest.raises(DataError, match="given twice"):
        resolve_sources([tmp_path / "a.txt", f"{tmp_path}/../{tmp_path.name}/a.txt"])
    with pytest.raises(DataError, match=r"a\.parquet: \.parquet files are not read"):
        resolve_sources([tmp_path / "a.parquet"])
    with pytest.raises(DataError, match="no source given"):
        resolve_sources([])


def test_a_file_that_changes_after_it_was_listed_is_noticed(tmp_path):
    text, lines, gone = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.txt"
    text.write_bytes(b"abc")
    lines.write_bytes(b'{"text": "abc"}\n')
    gone.write_bytes(b"abc")
    documents = {d.doc_id: d for d in listing_of(tmp_path).documents}
    text.write_bytes(b"abcd")
    lines.write_bytes(b'{"text":  "ab"}\n')
    gone.unlink()
    for doc_id in ("a.txt", "b.jsonl#L1"):
        with pytest.raises(DataError, match=r"\d bytes, 3 when it was listed"):
            documents[doc_id].read()
    with pytest.raises(DataError, match=r"c\.txt: cannot be read"):
        documents["c.txt"].read()
