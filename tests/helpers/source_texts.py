"""The texts of sources, and what was passed over."""

from pathlib import Path

from blt_titan.data.prepare.extents import Document, Extent, Item, PassedOver, Problem
from blt_titan.data.prepare.formats import read_extent
from blt_titan.data.prepare.sources import list_extents, resolve_sources

MAX_RECORD_BYTES = 1 << 20


def read(extents: list[Extent]) -> list[Item]:
    return [item for e in extents for item in read_extent(e, text_column="text", max_record_bytes=MAX_RECORD_BYTES)]


def texts_of(*names: str | Path) -> dict[str, bytes]:
    items = read(list_extents(resolve_sources(names)))
    assert not [item for item in items if isinstance(item, Problem)]
    return dict(item for item in items if isinstance(item, Document) and item.text)


def passed_over(*names: str | Path) -> dict[str, str]:
    """What is passed over, by its path, and of which kind."""
    items = read(list_extents(resolve_sources(names)))
    return {item.message.split(": ")[0]: item.kind for item in items if isinstance(item, PassedOver)}
