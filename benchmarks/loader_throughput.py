"""Measure how fast rows come out of the loader: real bytes per second, in the process and through a worker.

    python -m benchmarks.loader_throughput --out benchmarks/results/loader_throughput.json
    python -m benchmarks.loader_throughput --scored --out benchmarks/results/loader_throughput_scored.json

It writes synthetic documents (random words, exponential lengths of mean 5 KB) as shards into a temporary directory and
reads rows of 16,384 byte slots, cut at spaces, or by entropies from a sidecar of made-up values. A figure is the median
over repetitions, which alternate between the two ways because the machine may be shared. Starting the worker and
opening the streams are not measured. A CPU-second is one of this process or of its worker, so the second figure of
`num_workers_1` holds the transfer on both its ends.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.result_file import write_result
from blt_titan.batch import PADDING, Batch
from blt_titan.data.prepare.job import prepare
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.patcher import EntropyPatcher, TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.shards import ShardSet
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
from blt_titan.scoring.calibration import calibrate, read_sample

MEAN_DOCUMENT_BYTES = 5000
VOCABULARY_WORDS = 20_000
SHAPE = RowShape(segments=8, segment_bytes=2048, segment_patches=512)
MAX_PATCH_BYTES = 512
STREAMS = 16
ROWS_PER_BATCH = 4
WARM_UP_BATCHES = 40
TARGET_BYTES_PER_S_AND_CORE = 15e6


def write_documents(directory: Path, total_bytes: int, seed: int) -> Path:
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
    prepare([source], directory / "shards", validation_fraction=0, seed=seed, progress=False)
    return directory / "shards"


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


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40, help="text to read (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="length of one measurement (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of each way (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents and their order (default %(default)s)")
    parser.add_argument("--scored", action="store_true", help="cut by entropies from a sidecar instead of at spaces")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    torch.set_num_threads(1)  # a figure per core; the training process has other work for the rest
    rates: dict[int, list[Rates]] = {0: [], 1: []}
    kept: list[Batch] = []
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        written = write_documents(Path(directory), int(args.megabytes * 1e6), args.seed)
        if args.scored:
            write_entropies(written, args.seed)
        source = source_of(written, scored=args.scored)
        shards = source.shards
        order = StreamOrder(len(shards), STREAMS, args.seed)
        for num_workers in tqdm([0, 1] * args.repetitions, desc="measuring"):
            loader = RowLoader(source, order, rows_per_batch=ROWS_PER_BATCH, num_workers=num_workers)
            rate, kept = measure(loader, args.seconds)
            rates[num_workers].append(rate)
        data = {"documents": shards.documents, "text_bytes": shards.text_bytes, "record_batches": len(shards)}

    shares = padding_shares(kept)
    by_way = {
        f"num_workers_{n}": {name: [getattr(rate, name) for rate in measured] for name in Rates._fields}
        for n, measured in rates.items()
    }
    figures = {
        "load_average_before": round(load_before, 2),
        "data": data,
        "row": {"segments": SHAPE.segments, "bytes": SHAPE.n_bytes, "patches": SHAPE.n_patches},
        "rule": {"rule": "global" if args.scored else "space", "max_patch_bytes": MAX_PATCH_BYTES},
        "rows_per_batch": ROWS_PER_BATCH,
        "median": {way: {k: round(statistics.median(v)) for k, v in by.items()} for way, by in by_way.items()},
        "all": {way: {k: [round(x) for x in v] for k, v in by.items()} for way, by in by_way.items()},
        "target_bytes_per_s_and_core": TARGET_BYTES_PER_S_AND_CORE,
        **{key: round(value, 4) for key, value in shares.items()},
    }
    print(f"{'':<16}{'MB/s: median':>14}{'slowest':>10}{'fastest':>10}{'MB per CPU-second: median':>28}")
    for way, by in by_way.items():
        by_clock, by_cpu = ([rate / 1e6 for rate in by[name]] for name in Rates._fields)
        print(
            f"{way:<16}{statistics.median(by_clock):>14.1f}{min(by_clock):>10.1f}{max(by_clock):>10.1f}"
            f"{statistics.median(by_cpu):>28.1f}"
        )
    print(
        f"padding: {shares['byte_slots_padded']:.1%} of byte slots, {shares['patch_slots_padded']:.1%} of patch slots; "
        f"{shares['bytes_per_patch']:.2f} bytes per patch"
    )
    write_result(args.out, "loader_throughput", arguments, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
