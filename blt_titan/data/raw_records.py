r"""Tell a text from records that nobody meant to be trained on as text: keys, quotation marks and all.

{"text": "a"}\n{"text": "b"}\n        several objects: records, whatever the file is called
[{"text": "a"}, {"text": "b"}]        an array of objects with the text's key: records
{"data": [{"text": "a"}, ...]}        the same in an object
{"name": "x", "version": "1.0"}       one JSON document, as source trees hold many: a text
id,text\n1,a\n                        in a .csv or .tsv whose header names the text's column: records
"""

import json
import re
from typing import Any

from blt_titan.data.compression import compressed_content, compression_of
from blt_titan.data.extents import Extent
from blt_titan.data.file_systems import without_query

_DECODER = json.JSONDecoder()
_UTF8_BOM = b"\xef\xbb\xbf"
_LINES_LOOKED_AT = 10
_TABLES = {b"PAR1": "Parquet (.parquet)", b"ARROW1": "Arrow (.arrow)"}
_CONVERT = "write its records as .jsonl or .parquet"


def packed_records_in(head: bytes, extent: Extent) -> str:
    """Say what else than text a file is, by how it begins, and what to do about it; nothing if it may be text."""
    for magic, name in _TABLES.items():
        if head.startswith(magic):
            return f"is {name}; rename it so that its records are read"
    # In a tree it is one of many files that are not text.
    if extent.explicit and not compression_of(extent.path) and (name := compressed_content(head)):
        return f"is compressed by {name}; give its name the suffix of that"
    return ""


def records_in(text: bytes, extent: Extent, text_column: str) -> str:
    """Say what records a text seems to be, and what to do about it; nothing if it seems a text."""
    name = without_query(extent.path).lower()
    name = name.removesuffix(f".{compression_of(name)}")
    begin = text.removeprefix(_UTF8_BOM).lstrip()
    if name.endswith((".csv", ".tsv")):
        header, *rest = begin.split(b"\n", 1)
        columns = [column.strip(b"\"' \r") for column in re.split(rb"[,;\t]", header)]
        return f"has a column {text_column!r}; {_CONVERT}" if rest and text_column.encode() in columns else ""
    if _is_json_lines(begin):
        return "looks like JSON lines; rename it to end in .jsonl so that its records are read"
    if not begin.startswith((b"{", b"[")):
        return ""
    decoded = begin.decode(errors="replace")
    try:
        value, end = _DECODER.raw_decode(decoded)
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, dict) and decoded[end:].lstrip().startswith("{"):
        return f"looks like JSON objects in a row; {_CONVERT}"
    if _holds_records(value, text_column, extent.explicit) and not decoded[end:].strip():
        return f"looks like records of JSON; {_CONVERT}"
    return ""


def _is_json_lines(text: bytes) -> bool:
    """Tell whether the first lines are objects; one of them may be a header, or damaged."""
    lines: list[bytes] = []
    place = 0
    while place < len(text) and len(lines) < _LINES_LOOKED_AT:
        end = text.find(b"\n", place)
        end = len(text) if end < 0 else end
        if line := text[place:end].strip():
            lines.append(line)
        place = end + 1
    objects = sum(line[:1] == b"{" and line[-1:] == b"}" and _is_object(line) for line in lines)
    return objects >= 2 and objects >= len(lines) - 1


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode(errors="replace")), dict)
    except (ValueError, RecursionError):
        return False


def _holds_records(value: Any, text_column: str, explicit: bool) -> bool:
    """Tell whether a JSON document holds records; one that the user named is looked at more strictly."""
    if isinstance(value, dict):
        text = value.get(text_column)
        # A key of a program's words is often called so, and its value is short.
        long = isinstance(text, str) and (explicit or 2 * len(text) > len(json.dumps(value)))
        columns = isinstance(text, list) and bool(text) and all(isinstance(row, str) for row in text)
        return long or columns or any(_is_array(column, text_column, False) for column in value.values())
    return _is_array(value, text_column, explicit)


def _is_array(value: Any, text_column: str, explicit: bool) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return False
    return explicit or all(isinstance(row.get(text_column), str) for row in value)
