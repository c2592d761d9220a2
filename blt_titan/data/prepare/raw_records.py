r"""Tell a text from records that nobody meant to be trained on as text: keys, quotation marks and all.

{"text": "a"}\n{"text": "b"}\n        several objects: records, whatever the file is called
[{"text": "a ..."}, {"text": "b ..."}]    an array of objects that are mostly the text's key: records
{"data": [{"text": "a"}, ...]}        the same in an object
{"name": "x", "version": "1.0"}       one JSON document, as source trees hold many: a text
id,text\n1,a\n                        in a .csv or .tsv whose header names the text's column: records
"""

import json
import re
from typing import Any

from blt_titan.data.prepare.compression import compressed_content, compression_of
from blt_titan.data.prepare.extents import Extent
from blt_titan.data.prepare.file_systems import without_query

_DECODER = json.JSONDecoder()
_UTF8_BOM = b"\xef\xbb\xbf"
_LINES_LOOKED_AT = 10
_MOST_PARSED_BYTES = 4 * 1024**2
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"\s*:\s*')
_BETWEEN = re.compile(r"[\s,]*")
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
        return (
            f"has a column {text_column!r}; {_CONVERT}"
            if rest and text_column.encode(errors="surrogateescape") in columns
            else ""
        )
    if _is_json_lines(begin):
        return "looks like JSON lines; rename it to end in .jsonl so that its records are read"
    if not begin.startswith((b"{", b"[")):
        return ""
    # To parse takes many times the memory, so of a large document only the beginning is looked at.
    is_whole = len(begin) <= _MOST_PARSED_BYTES
    decoded = begin[:_MOST_PARSED_BYTES].decode(errors="replace")
    try:
        value, end = _DECODER.raw_decode(decoded)
    except (ValueError, RecursionError):
        value, end = (None, len(decoded)) if is_whole else (_first_elements(decoded), len(decoded))
    if isinstance(value, dict) and decoded[end:].lstrip().startswith("{"):
        return f"looks like JSON objects in a row; {_CONVERT}"
    if _holds_records(value, text_column, extent.explicit) and not decoded[end:].strip():
        return f"looks like records of JSON; {_CONVERT}"
    return ""


def _first_elements(text: str) -> Any:
    """Return an array, or an object that begins with one, with no more than its first elements; None of others.

    >>> _first_elements('{"rows": [{"text": "a"}, {"text": "b')
    {'rows': [{'text': 'a'}]}
    """
    key = _FIRST_KEY.match(text)
    place = key.end() if key else 0
    if text[place : place + 1] != "[":
        return None
    elements: list[Any] = []
    while len(elements) < _LINES_LOOKED_AT:
        place = _BETWEEN.match(text, place + (not elements)).end()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            element, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            break
        elements.append(element)
    return {key[1]: elements} if key else elements


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
    if explicit and isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return True
    texts = _texts_in(value, text_column)
    # A key of a program's words is often called so, as that of a menu, and its values are short.
    return bool(texts) and (explicit or 2 * sum(map(len, texts)) > len(json.dumps(value, ensure_ascii=False)))


def _texts_in(value: Any, text_column: str) -> list[str]:
    """Return the texts of an object, of a column, or of an array of objects; nothing if it is none of these."""
    if isinstance(value, dict):
        text = value.get(text_column)
        if isinstance(text, str):
            return [text]
        if isinstance(text, list) and all(isinstance(row, str) for row in text):
            return text
        return [text for column in value.values() for text in _texts_of_rows(column, text_column)]
    return _texts_of_rows(value, text_column)


def _texts_of_rows(rows: Any, text_column: str) -> list[str]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return []
    texts = [row.get(text_column) for row in rows]
    return texts if all(isinstance(text, str) for text in texts) else []
