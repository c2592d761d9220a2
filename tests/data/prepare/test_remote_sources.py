"""Sources that are not on this machine: object stores, the web and the hub."""

import gzip
import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt_titan.data.prepare.extents import Document, Problem
from blt_titan.data.prepare.formats import read_extent
from blt_titan.data.prepare.sources import HUB_PRESETS, group, list_extents, resolve_sources
from blt_titan.data.store.errors import DataError
from tests.helpers.source_texts import MAX_RECORD_BYTES, read, texts_of


def test_sources_of_an_object_store_that_hold_the_same_file_are_refused():
    fsspec.filesystem("memory").pipe_file("/twice/a.txt", b"a")
    with pytest.raises(DataError, match=r"in the source memory://twice/\*\.txt and, as memory:.*memory://twice, so"):
        list_extents(resolve_sources(["memory://twice", "memory://twice/*.txt"]))
    with pytest.raises(DataError, match="given twice"):
        resolve_sources(["hf:name", "hf:name::train"])


def test_a_listing_without_sizes_says_nothing_of_size(monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/unsized/a.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))
    fs.pipe_file("/unsized/b.txt", b"b")
    info, find = type(fs).info, type(fs).find
    monkeypatch.setattr(type(fs), "info", lambda *args, **options: info(*args, **options) | {"size": None})
    monkeypatch.setattr(
        type(fs), "find", lambda *args, **options: {k: v | {"size": None} for k, v in find(*args, **options).items()}
    )
    assert texts_of("memory://unsized") == {"a.jsonl.gz#L1": b"a", "b.txt": b"b"}
    assert texts_of("memory://unsized/a.jsonl.gz") == {"a.jsonl.gz#L1": b"a"}
    # What is unknown may be large.
    assert len(group(list_extents(resolve_sources(["memory://unsized"])))) == 2


def test_the_web_is_read_by_its_own_listings(tmp_path):
    """They have no sizes; a page with links is no listing, and a query no pattern."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "page.html").write_bytes(b'<a href="sub/a.jsonl.gz">a</a>')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "b"}\n')
    handler_class = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = partial(handler_class, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        try:
            assert texts_of(f"{web}/sub") == texts_of(f"{web}/sub/*.gz") == {"a.jsonl.gz#L1": b"a"}
            assert texts_of(f"{web}/page.html") == {"page.html": b'<a href="sub/a.jsonl.gz">a</a>'}
            assert texts_of(f"{web}/b.jsonl?download=true") == {"b.jsonl?download=true#L1": b"b"}
        finally:
            server.shutdown()


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
