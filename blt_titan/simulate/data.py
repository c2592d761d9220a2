"""Terabytes of text that are on no disk, for the real order, streams, packer and loader to read.

A few dozen record batches of random words, the templates, are made and cut into patches once. Record batch n of the
data is template n mod TEMPLATES with n itself written into its text as ten digits, every so many bytes, so that no two
rows hold the same ids:

    template 3    "dka 0000000000yte ro, wmh... "
    n = 34        "dka 0000000034yte ro, wmh... "

What is taken from a template is where patches begin; a rule by entropy is given drawn entropies. Everything else is as
in a run: a manifest of shards, its fingerprint, numbers of record batches, rows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from blt_titan.byte_vocab import BYTE_OFFSET
from blt_titan.data.rows.mixture import MixtureOrder, ShardSets, mixture_order
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import PatchedIds, RowShape
from blt_titan.data.rows.patcher import EntropyPatcher, RowPatcher, TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.manifest import Counts, Manifest, ShardEntry
from blt_titan.data.store.shards import SHARD_BYTES, RecordBatch, RecordBatchInfo, ShardSet
from blt_titan.patching.rounding import Storage
from blt_titan.patching.rule import PatchRule

TEMPLATES = 31
MEAN_DOCUMENT_BYTES = 6000
_DIGITS = 10
_TENS = 10 ** np.arange(_DIGITS - 1, -1, -1)
_STAMPS_OF_A_ROW = 16
_LEAST_BETWEEN_STAMPS = 32


@dataclass(frozen=True)
class Text:
    """What there is to read, and how; small, as it crosses to other processes."""

    sets: tuple[tuple[str, int], ...]
    """Directory and bytes of each data set; there need be no such directory."""
    weights: tuple[float, ...]
    """Their weights in a mixture; empty for one that is none."""
    record_batch_bytes: int
    streams: int
    order_seed: int
    """As `data.seed`."""
    rule: PatchRule
    shape: RowShape
    seed: int = 0
    """Another seed, other text."""
    custom_import: str = ""
    """The module that registers the rule."""


class _Template(NamedTuple):
    text: np.ndarray
    offsets: np.ndarray
    stamps: np.ndarray
    """Where the digits are in the text, int64 [stamps, _DIGITS]."""
    stamps_in_ids: np.ndarray


class Templates:
    """The record batches that all others are copies of."""

    def __init__(self, record_batch_bytes: int, row_bytes: int, seed: int):
        rng = np.random.default_rng(seed)
        between = max(_LEAST_BETWEEN_STAMPS, row_bytes // _STAMPS_OF_A_ROW)
        sizes = rng.integers(record_batch_bytes * 3 // 4, record_batch_bytes + 1, TEMPLATES)
        self.all = [_template(rng, int(size), between) for size in sizes]
        self.text_bytes = np.array([len(one.text) for one in self.all])
        self.documents = np.array([len(one.offsets) - 1 for one in self.all])

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        """Return the ids of record batches by their numbers, BOS and EOS counted."""
        return (self.text_bytes + 2 * self.documents)[numbers % TEMPLATES]


def _template(rng: np.random.Generator, size: int, between: int) -> _Template:
    text = rng.integers(ord("a"), ord("z") + 1, size, dtype=np.uint8)
    spaces = np.cumsum(rng.integers(2, 10, size // 5))
    text[spaces[spaces < size]] = ord(" ")
    ends = np.cumsum(1 + rng.exponential(MEAN_DOCUMENT_BYTES, 2 + 2 * size // MEAN_DOCUMENT_BYTES).astype(np.int64))
    offsets = np.concatenate([[0], ends[ends < size], [size]])
    stamps = np.arange(0, size - _DIGITS, between)[:, None] + np.arange(_DIGITS)
    text[stamps] = ord("0")
    document = np.searchsorted(offsets, stamps, side="right") - 1
    return _Template(text, offsets, stamps, stamps + 1 + 2 * document)


class SyntheticShards(ShardSet):
    """A data set of a manifest whose files are not there; its record batches are made when they are read.

    Args:
        directory: where it would be.
        text_bytes: about how much text it holds.
        templates: what its record batches are copies of.
        record_batch_bytes: the most text of a record batch.
        first: the number of its first record batch among those of all data sets.
    """

    def __init__(self, directory: str, text_bytes: int, templates: Templates, record_batch_bytes: int, first: int):
        self._templates, self.first = templates, first
        self._of_a_shard = max(1, SHARD_BYTES // record_batch_bytes)
        count = max(1, round(text_bytes / templates.text_bytes.mean()))
        borders = np.append(np.arange(0, count, self._of_a_shard), count)
        columns = [np.diff(_sum_to(borders + first, kind)) for kind in (templates.text_bytes, templates.documents)]
        entries = tuple(
            ShardEntry(
                file=f"train-{number:05d}.arrow",
                index_file=f"train-{number:05d}.index.npy",
                index_sha256=hashlib.sha256(f"{directory} {number} {n} {documents} {size}".encode()).hexdigest(),
                file_bytes=size + 64 * documents,
                record_batches=n,
                documents=documents,
                text_bytes=size,
            )
            for number, (n, size, documents) in enumerate(
                zip(np.diff(borders).tolist(), *(column.tolist() for column in columns), strict=True)
            )
        )
        total, documents = (int(column.sum()) for column in columns)
        self.manifest = Manifest({}, Counts(documents, total, 0, 0, 0), {"train": entries, "validation": ()})
        super().__init__(directory, "train", manifest=self.manifest)

    def _check_files(self, entry: ShardEntry) -> None:
        """Pass: there are none."""

    def record_batch_info(self, i: int) -> RecordBatchInfo:
        """Say where record batch i of 0..R-1 would lie; as its checksum stands its number among those of all data."""
        if not 0 <= i < len(self):
            raise IndexError(f"record batch {i} is outside 0..{len(self) - 1}")
        shard, in_shard = divmod(i, self._of_a_shard)
        number = self.first + i
        size, rows = (int(kind[number % TEMPLATES]) for kind in (self._templates.text_bytes, self._templates.documents))
        path = self.folder.place / self._shards[shard].file
        return RecordBatchInfo(path, in_shard, 0, size, rows, size, number)

    def read(self, i: int) -> RecordBatch:
        """Make record batch i of 0..R-1."""
        info = self.record_batch_info(i)
        template = self._templates.all[info.crc32 % TEMPLATES]
        text = template.text.copy()
        text[template.stamps] = ord("0") + info.crc32 // _TENS % 10
        names = np.empty(0, np.uint8), np.zeros(info.rows + 1, np.int64)
        return RecordBatch(info.shard_path, info.batch_in_shard, text, template.offsets, info.crc32, *names)


def _sum_to(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the sums of `values[n % len(values)]` over all n below each number."""
    before = np.concatenate([[0], np.cumsum(values)])
    return numbers // len(values) * before[-1] + before[numbers % len(values)]


class _DrawnEntropies:
    """Entropies of a template: drawn, the same each time."""

    fingerprint = "drawn"
    storage: Storage = "float16"

    def __call__(self, batch: RecordBatch) -> np.ndarray:
        rng = np.random.default_rng(len(batch.text))
        return rng.gamma(1.0, 1.0, len(batch.text)).astype(np.float16).astype(np.float32)


def run_patcher(rule: PatchRule) -> RowPatcher:
    """Return what cuts text into patches in a run, given drawn entropies where the rule asks for some."""
    return EntropyPatcher(rule, _DrawnEntropies()) if rule.by_entropy else TextPatcher(rule)


class TemplatePatcher:
    """Patches of record batches: those of their templates, each cut once by the run's rule."""

    def __init__(self, rule: PatchRule, templates: Templates):
        self._templates, self._inner = templates, run_patcher(rule)
        self._cut: dict[int, PatchedIds] = {}

    @property
    def rule(self) -> PatchRule:
        """The rule, and how entropies are rounded before it decides."""
        return self._inner.rule

    @property
    def decided_by(self) -> Mapping[str, Any]:
        """What decides where patches begin."""
        return self._inner.decided_by

    def read_beside(self, batch: RecordBatch) -> None:
        """Return nothing: entropies come with the templates."""

    def patch(self, batch: RecordBatch, beside: np.ndarray | None = None) -> PatchedIds:
        """Frame the documents of a record batch, and cut them as its template's."""
        template = self._templates.all[batch.crc32 % TEMPLATES]
        cut = self._cut.get(batch.crc32 % TEMPLATES)
        if cut is None:
            cut = self._cut[batch.crc32 % TEMPLATES] = self._inner.patch(replace(batch, text=template.text))
        ids = cut.ids.copy()
        ids[template.stamps_in_ids] = batch.text[template.stamps].astype(np.int16) + BYTE_OFFSET
        return PatchedIds(ids, cut.cuts.copy())


class Data(NamedTuple):
    """Text that can be read, and its order."""

    source: RowSource
    order: StreamOrder | MixtureOrder
    templates: Templates


@lru_cache(maxsize=2)
def open_text(text: Text) -> Data:
    """Open what there is to read; a process keeps the last two.

    Raises:
        DataError: the weights of a mixture cannot be had.
        CustomImportError: the module of the rule cannot be imported.
    """
    if text.custom_import:
        from blt_titan.custom_import import import_custom

        import_custom(text.custom_import)
    templates = Templates(text.record_batch_bytes, text.shape.n_bytes, text.seed)
    sets: list[SyntheticShards] = []
    for directory, text_bytes in text.sets:
        first = sum(map(len, sets))
        sets.append(SyntheticShards(directory, text_bytes, templates, text.record_batch_bytes, first))
    shards = ShardSets(sets)
    order = StreamOrder(len(shards), text.streams, text.order_seed)
    if text.weights:
        order = mixture_order(shards, text.weights, streams=text.streams, seed=text.order_seed)
    return Data(RowSource(shards, TemplatePatcher(text.rule, templates), text.shape), order, templates)
