"""Trees of text as users have them: records in many formats, sound and damaged, links, odd names, archives."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from tests.fuzz.draw import FOLDER_NAMES, Draw

TEXT_SUFFIXES = (".txt", "", ".py", ".md", ".html", ".json", ".jsonl", ".csv")
RECORD_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".ipc", ".feather", ".JSONL")
PACKINGS = ("", "", "", ".gz", ".zst", ".bz2", ".xz")


def write_tree(draw: Draw, root: Path) -> list[str]:
    """Write a tree; return what is in it, in words."""
    root.mkdir(parents=True)
    folders, said = [root], []
    for name in draw.some(FOLDER_NAMES, 2):
        folder = draw.choice(folders) / name
        folder.mkdir(parents=True, exist_ok=True)
        folders.append(folder)
    if draw.chance(0.7):
        (root / "text.txt").write_bytes(b"some text to be found\n" * draw.randint(1, 30))
    for _ in range(draw.choice([0, 1, 1, 2, 3, 5, 8])):
        said.append(_write_file(draw, draw.choice(folders)))
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        said.append(_write_link(draw, draw.choice(folders), folders))
    return [what for what in said if what]


def _write_file(draw: Draw, folder: Path) -> str:
    kind = draw.choices(["text", "records", "saved data set", "archive", "pipe"], [5, 6, 1, 1, 0.5])[0]
    if kind == "saved data set":
        return _write_saved_data_set(draw, folder / "saved")
    if kind == "pipe":
        if not (folder / "pipe.txt").exists():
            os.mkfifo(folder / "pipe.txt")
        return "pipe.txt: a named pipe"
    if kind == "archive":
        path = folder / f"archive{draw.choice(['.zip', '.tar', '.tar.gz', '.7z'])}"
        path.write_bytes(_archive(draw, path.name))
    elif kind == "text":
        path = folder / draw.file_name()
        if draw.chance(0.4):
            path = folder / f"{draw.randrange(9)}{draw.choice(TEXT_SUFFIXES)}"
        packing = draw.choice(PACKINGS)
        path = path.with_name(path.name + packing)
        path.write_bytes(_packed(draw.text(), packing))
    else:
        suffix = draw.choice(RECORD_SUFFIXES)
        packing = draw.choice(PACKINGS) if "js" in suffix.lower() else ""
        path = folder / f"{draw.randrange(9)}{suffix}{packing}"
        path.write_bytes(_packed(_records(draw, suffix.lower()), packing))
    what = ""
    if draw.chance(0.25):
        content = path.read_bytes()
        place = draw.randint(0, len(content))
        content, what = draw.choice(
            [
                (content[:place], f" cut at {place}"),
                (content[:place] + draw.randbytes(4) + content[place + 4 :], f" 4 random bytes at {place}"),
                (b"", " empty"),
                (content + bytes(16), " NUL at the end"),
                (content + content, " twice"),
                (b"\xef\xbb\xbf" + content, " a byte order mark"),
            ]
        )
        path.write_bytes(content)
    return f"{path.name!r}: {kind}{what}, {path.stat().st_size} bytes"


def _packed(content: bytes, packing: str) -> bytes:
    if packing == ".zst":
        return pa.Codec("zstd").compress(content, asbytes=True)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(packing)
    return pack(content) if pack else content


def _records(draw: Draw, suffix: str) -> bytes:
    texts = [draw.text().decode(errors="replace") for _ in range(draw.choice([0, 1, 3, 8]))]
    column = draw.choice(["text"] * 6 + ["content", "", "TEXT"])
    if "js" in suffix:
        return b"\n".join(_json_line(draw, column, text) for text in texts) + draw.choice([b"\n", b"", b"\n\n"])
    types = [pa.string()] * 4 + [
        pa.large_string(),
        pa.binary(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ]
    values: list = [None if draw.chance(0.1) else text for text in texts]
    kind = draw.choice(types)
    if draw.chance(0.1):
        values, kind = list(range(len(texts))), pa.int64()
    table = pa.table({column: pa.array(values, pa.string() if pa.types.is_dictionary(kind) else kind)})
    if pa.types.is_dictionary(kind):
        table = pa.table({column: table[column].dictionary_encode()})
    if draw.chance(0.1):
        table = pa.table([table.column(0), table.column(0)], names=[column, column])
    out = io.BytesIO()
    if suffix == ".parquet":
        pq.write_table(
            table.cast(pa.schema([(n, pa.string()) for n in table.column_names]))
            if kind == pa.string_view()
            else table,
            out,
        )
    elif suffix == ".feather":
        if kind == pa.string_view():
            table = table.cast(pa.schema([(n, pa.string()) for n in table.column_names]))
        pyarrow.feather.write_feather(table, out, compression=draw.choice(["lz4", "uncompressed"]))
    else:
        new = pa.ipc.new_stream if draw.chance(0.5) else pa.ipc.new_file
        with new(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue()


def _json_line(draw: Draw, column: str, text: str) -> bytes:
    if draw.chance(0.85):
        return json.dumps({column: text, "id": 1}, ensure_ascii=draw.chance(0.5)).encode(errors="replace")
    try:
        other = json.dumps(draw.json_value())
    except ValueError:
        other = "1" * 5000
    return draw.choice(
        [
            *(b"", b"   ", b"{", b"null", b"[1]", b'"text"', b"\0\0\0", b"\xff\xfe", b"{}", b"{" * 2000),
            *(
                b'{"text": 1}',
                b'{"text": null}',
                b'{"text": ["x"]}',
                b'{"text": "a", "text": "b"}',
                b'{"text": "\\ud800"}',
            ),
            *(b'{"text": "a"} {"text": "b"}', b'{"text": "a",}', b"{'text': 'a'}", b'{"text": NaN}', other.encode()),
            b'{"text": "' + text.encode(errors="replace")[:20],
        ]
    )


def _archive(draw: Draw, name: str) -> bytes:
    out = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("a.txt", draw.text())
    elif ".tar" in name:
        with tarfile.open(fileobj=out, mode="w:gz" if name.endswith("gz") else "w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    else:
        return b"7z\xbc\xaf\x27\x1c" + draw.randbytes(20)
    return out.getvalue()


def _write_saved_data_set(draw: Draw, folder: Path) -> str:
    """Write what `datasets.Dataset.save_to_disk` leaves."""
    folder.mkdir(exist_ok=True)
    table = pa.table({"text": [draw.text().decode(errors="replace") for _ in range(3)]})
    with open(folder / "data-00000-of-00001.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    return "saved: a data set of save_to_disk"


def _write_link(draw: Draw, folder: Path, folders: list[Path]) -> str:
    files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    target = draw.choice([".", "..", "nowhere", "../nowhere", "loop", "/dev/null", str(draw.choice(folders))])
    if files and draw.chance(0.4):
        target = draw.choice(files).name
    path = folder / draw.choice(["loop", "link.txt", "link.jsonl", "z"])
    if os.path.lexists(path):
        return ""
    path.symlink_to(target)
    return f"{path.name!r}: a link to {target!r}"
