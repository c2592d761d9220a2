"""A record batch of byte documents: where it lies, and what was read of it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from blt_titan.data.store.address import Place


class RecordBatchInfo(NamedTuple):
    """Where a record batch lies and what it holds; `offset`, `length` and `text_bytes` are in bytes."""

    shard_path: Place
    batch_in_shard: int
    offset: int
    length: int
    rows: int
    text_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, eq=False)
class RecordBatch:
    """The documents of one record batch: document i is `text[offsets[i]:offsets[i + 1]]`.

    Attributes:
        shard_path: the file it came from.
        batch_in_shard: its place in that file.
        text: uint8 [text bytes], read-only, a view into the memory map, or the fetched bytes, that it keeps alive.
        offsets: int64 [rows + 1], from 0 to the number of text bytes.
        crc32: of the record batch's raw bytes; what sidecars call it by.
        id_bytes: the documents' names as UTF-8, uint8, a view too.
        id_offsets: of the names, int64 [rows + 1].
    """

    shard_path: Place
    batch_in_shard: int
    text: np.ndarray
    offsets: np.ndarray
    crc32: int
    id_bytes: np.ndarray
    id_offsets: np.ndarray

    @property
    def rows(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    @property
    def doc_ids(self) -> list[str]:
        """The documents' names, made anew at each call."""
        names = self.id_bytes.tobytes()
        return [names[begin:end].decode() for begin, end in pairwise(self.id_offsets.tolist())]

    def document(self, row: int) -> np.ndarray:
        """Give the bytes of one document, uint8 [N], a view."""
        return self.text[self.offsets[row] : self.offsets[row + 1]]
