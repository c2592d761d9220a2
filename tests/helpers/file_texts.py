"""What a file gives when it is read as a source."""

from pathlib import Path

from blt_titan.data.prepare.extents import Document, Item, Problem
from blt_titan.data.prepare.formats import read_extent
from blt_titan.data.prepare.sources import list_extents, resolve_sources

TEXTS = ["plain", "", "é 😀 \u2028 inside", "NUL \0 inside", "CRLF\r\n", "x" * 3000, '"quoted" \\ {"text": "no"}']


def items_of(
    path: Path, text_column: str = "text", max_record_bytes: int = 1 << 20, as_text: bool = False
) -> list[Item]:
    settings = {"text_column": text_column, "max_record_bytes": max_record_bytes, "as_text": as_text}
    return [item for extent in list_extents(resolve_sources([path])) for item in read_extent(extent, **settings)]


def texts_of(path: Path, **options) -> list[bytes]:
    items = items_of(path, **options)
    assert not [item for item in items if isinstance(item, Problem)]
    return [item.text for item in items if isinstance(item, Document)]
