"""Suite of data: how fast rows come out of the loader, in the process and through a worker, real bytes per second.

It writes documents (random words, exponential lengths of mean 5 KB) as shards into a temporary directory and reads rows
of 16,384 byte slots, cut at spaces, and by entropies from a sidecar of made-up values. A figure is the median over
repetitions, which alternate between the two ways because the machine may be shared. Starting the worker and opening the
streams are not measured. A CPU-second is one of this process or of its worker, so the second figure of `num_workers_1`
holds the transfer on both its ends.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from blt_titan.batch import PADDING, Batch
from blt_titan.bench.options import Options, Suite
from blt_titan.bench.table import Table
from blt_titan.data.prepare.job import prepare
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.patcher import EntropyPatcher, TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.shards import SHARD_BYTES, ShardSet
from blt_titan.data.store.sidecars import (
    EntropySidecar,
    EntropySidecars,
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
    sidecar_directory,
)
from blt_titan.patching.rule import PatchRule
from blt_titan.progress import ProgressBar
from blt_titan.scoring.calibration import calibrate, read_sample

MEAN_DOCUMENT_BYTES = 5000
VOCABULARY_WORDS = 20_000
SHAPE = RowShape(segments=8, segment_bytes=2048, segment_patches=512)
MAX_PATCH_BYTES = 512
STREAMS = 16
ROWS_PER_BATCH = 4
WARM_UP_BATCHES = 40
TARGET_BYTES_PER_S_AND_CORE = 15e6
TEXT_BYTES, TINY_TEXT_BYTES = 40_000_000, 6_000_000
SECONDS, TINY_SECONDS = 3.0, 0.2
"""Length of one measurement."""


def write_documents(directory: Path, total_bytes: int, seed: int, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write documents of random words as shards; return their directory."""
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("etaoinshrdlucmfwypvbgkjqxz"), size=(VOCABULARY_WORDS, 14))
    lengths = 1 + rng.poisson(3.7, VOCABULARY_WORDS).clip(max=13)
    words = np.array(["".join(row[:length]) for row, length in zip(letters, lengths, strict=True)])
    source = directory / "documents.jsonl"
    left_bytes = total_bytes
    with source.open("w") as file:
        while left_bytes > 0:
            size = max(1, int(rng.exponential(MEAN_DOCUMENT_BYTES)))
            text = " ".join(words[rng.integers(VOCABULARY_WORDS, size=size // 4 + 1)])[:size]
            file.write(json.dumps({"text": text}) + "\n")
            left_bytes -= size
    shards = directory / "shards"
    prepare([source], shards, validation_fraction=0, seed=seed, shard_bytes=shard_bytes, progress=False)
    return shards


def write_entropies(directory: Path, seed: int) -> None:
    """Write a sidecar of random entropies."""
    settings = SidecarSettings("float16", {}, "made up", "float32")
    begin_sidecar(directory, "default", settings)
    shards, rng = ShardSet(directory, "train"), np.random.default_rng(seed)
    writers = {e.file: SidecarWriter(sidecar_directory(directory, "default"), e, "float16") for e in shards.entries}
    for batch in shards:
        entropies = rng.gamma(1.2, 0.8, len(batch.text)).astype(np.float32)
        writers[batch.shard_path.name].add(batch.batch_in_shard, entropies, batch.crc32)
    for writer in writers.values():
        writer.finish()
    complete_sidecar(directory, "default", settings)


def source_of(directory: Path, *, scored: bool) -> RowSource:
    """Return what makes the rows: patches of about 4.5 bytes."""
    shards = ShardSet(directory, "train")
    if not scored:
        return RowSource(shards, TextPatcher(PatchRule("space", max_patch_bytes=MAX_PATCH_BYTES)), SHAPE)
    sidecar = EntropySidecar(directory, "default", shards)
    found = calibrate(read_sample(shards, sidecar, sample_bytes=2_000_000), 4.5, max_patch_bytes=MAX_PATCH_BYTES)
    rule = PatchRule("global", found.threshold, max_patch_bytes=MAX_PATCH_BYTES)
    return RowSource(shards, EntropyPatcher(rule, EntropySidecars([sidecar])), SHAPE)


class Rates(NamedTuple):
    """Real bytes in one measurement, by the clock and by the processor time of all processes."""

    bytes_per_s: float
    bytes_per_cpu_s: float


def measure(loader: RowLoader, seconds: float) -> tuple[Rates, list[Batch]]:
    """Return the rates over at least `seconds`, and a few of the batches."""
    batches = iter(loader)
    kept = list(islice(batches, WARM_UP_BATCHES))  # opens every stream
    n_bytes, start, start_cpu = 0, time.perf_counter(), cpu_seconds()
    while (elapsed := time.perf_counter() - start) < seconds:
        n_bytes += int((next(batches).layout.byte_doc_BS != PADDING).sum())
    return Rates(n_bytes / elapsed, n_bytes / (cpu_seconds() - start_cpu)), kept


def cpu_seconds() -> float:
    """Return the processor time that this process and its workers have used."""
    ticks = 0
    for child in multiprocessing.active_children():
        after_name = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def padding_shares(batches: list[Batch]) -> dict[str, float]:
    """Return the shares of byte slots and patch slots that are padding, and bytes per patch."""
    real_bytes = torch.cat([batch.layout.byte_doc_BS for batch in batches]) != PADDING
    real_patches = torch.cat([batch.layout.patch_doc_BP for batch in batches]) != PADDING
    return {
        "byte_slots_padded": 1 - real_bytes.float().mean().item(),
        "patch_slots_padded": 1 - real_patches.float().mean().item(),
        "bytes_per_patch": (real_bytes.sum() / real_patches.sum()).item(),
    }


def measure_rows(written: Path, options: Options, *, scored: bool) -> dict[str, Any]:
    """Measure both ways on rows that are cut by entropies (`scored`) or at spaces."""
    source = source_of(written, scored=scored)
    order = StreamOrder(len(source.shards), STREAMS, options.seed)
    rates: dict[int, list[Rates]] = {0: [], 1: []}
    kept: list[Batch] = []
    for num_workers in ProgressBar([0, 1] * options.repeats, desc="rows", leave=False, disable=not options.progress):
        loader = RowLoader(source, order, rows_per_batch=ROWS_PER_BATCH, num_workers=num_workers)
        rate, kept = measure(loader, TINY_SECONDS if options.tiny else SECONDS)
        rates[num_workers].append(rate)
    by_way = {
        f"num_workers_{n}": {name: [getattr(rate, name) for rate in measured] for name in Rates._fields}
        for n, measured in rates.items()
    }
    return {
        "median": {way: {k: round(statistics.median(v)) for k, v in by.items()} for way, by in by_way.items()},
        "all": {way: {k: [round(x) for x in v] for k, v in by.items()} for way, by in by_way.items()},
        **{key: round(value, 4) for key, value in padding_shares(kept).items()},
    }


def data(options: Options) -> dict[str, Any]:
    """Measure rows of both kinds."""
    torch.set_num_threads(1)  # a figure per core; the training process has other work for the rest
    with tempfile.TemporaryDirectory() as directory:
        written = write_documents(Path(directory), TINY_TEXT_BYTES if options.tiny else TEXT_BYTES, options.seed)
        write_entropies(written, options.seed)
        rules = {rule: measure_rows(written, options, scored=rule == "global") for rule in ("space", "global")}
        shards = ShardSet(written, "train")
        text = {"documents": shards.documents, "text_bytes": shards.text_bytes, "record_batches": len(shards)}
    return {
        "settings": {"repeats": options.repeats, "seed": options.seed, "rows_per_batch": ROWS_PER_BATCH},
        "data": text,
        "row": {"segments": SHAPE.segments, "bytes": SHAPE.n_bytes, "patches": SHAPE.n_patches},
        "max_patch_bytes": MAX_PATCH_BYTES,
        "target_bytes_per_s_and_core": TARGET_BYTES_PER_S_AND_CORE,
        "rules": rules,
    }


def data_table(result: dict[str, Any]) -> Table:
    """Show rates and what is padding."""
    rows = [
        [
            f"{rule}, {way.removeprefix('num_workers_')} workers",
            f"{found['bytes_per_s'] / 1e6:.1f}",
            f"{found['bytes_per_cpu_s'] / 1e6:.1f}",
            f"{of_rule['byte_slots_padded']:.1%}",
            f"{of_rule['patch_slots_padded']:.1%}",
        ]
        for rule, of_rule in result["rules"].items()
        for way, found in of_rule["median"].items()
    ]
    header = ["patches by", "MB/s by the clock", "MB per CPU-second", "byte slots padded", "patch slots padded"]
    return Table(f"rows out of the loader, medians of {result['settings']['repeats']}", header, rows)


SUITE = Suite("rows out of the loader", data, data_table)
