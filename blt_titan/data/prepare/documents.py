"""Documents one by one, of byte shards or of anything that `prepare` reads: for evaluation, not for training."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blt_titan.data.prepare.extents import Document, Problem
from blt_titan.data.prepare.formats import read_extent
from blt_titan.data.prepare.job import MAX_RECORD_BYTES
from blt_titan.data.prepare.sources import list_extents, resolve_sources
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import MANIFEST_NAME, read_manifest
from blt_titan.data.store.shards import ShardSet

logger = logging.getLogger(__name__)


class SourcedDocument(NamedTuple):
    """A document and where it comes from."""

    source: str
    doc_id: str
    text: bytes


def read_documents(
    path: str | os.PathLike[str], *, split: str = "validation", text_column: str = "text", as_text: bool = False
) -> Iterator[SourcedDocument]:
    """Yield the documents of a data set, or of files; empty ones are left out.

    Args:
        path: a directory of byte shards, or what `prepare` takes as a source.
        split: of byte shards.
        text_column: of records in files.
        as_text: take files as texts even where they look like records.

    Raises:
        DataError: nothing is there, a record is damaged, or it cannot be used.
    """
    if (Path(path) / MANIFEST_NAME).is_file():
        yield from _of_shards(path, split)
        return
    for source in resolve_sources([path]):
        for extent in list_extents([source]):
            for item in read_extent(
                extent, text_column=text_column, max_record_bytes=MAX_RECORD_BYTES, as_text=as_text
            ):
                if isinstance(item, Problem):
                    raise DataError(item.message)
                if not isinstance(item, Document):
                    logger.warning(f"left out: {item.message}")
                elif item.text:
                    yield SourcedDocument(source.setting, item.doc_id, item.text)


def _of_shards(path: str | os.PathLike[str], split: str) -> Iterator[SourcedDocument]:
    settings = [str(name) for name in read_manifest(path).settings.get("sources", [])]
    # Of several sources each document's id begins with the name of its own: the last part, or all where that is not
    # enough to tell them apart.
    names = {name: source for source in settings for name in (source.rstrip("/").rpartition("/")[2], source)}
    by_length = sorted(names, key=len, reverse=True)
    for batch in ShardSet(path, split):
        for row, doc_id in enumerate(batch.doc_ids):
            if text := batch.document(row).tobytes():
                begins = (name for name in by_length if doc_id.startswith((f"{name}/", f"{name}#")) or doc_id == name)
                source = settings[0] if len(settings) == 1 else names.get(next(begins, ""), str(path))
                yield SourcedDocument(source, doc_id, text)
