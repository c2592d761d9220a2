"""Measure rows out of the loader from local files, file://, memory:// and an S3 server on this machine.

    python -m benchmarks.object_stores --out benchmarks/results/object_stores.json

The data and the rows are those of `blt-titan bench data`, cut at spaces. Each measurement begins with an empty cache
and reads every record batch at most once. Rates are by the clock and by the processor time of the loader's own
processes, the server's left out; the cost of the network is bytes fetched per byte of text in rows. The S3 server
(moto) shares the machine's cores, and reads a whole object for each range of it that is asked for: shards are small, so
that the loader is what is measured.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import fsspec
import torch

from benchmarks.result_file import write_result
from blt_titan.batch import PADDING
from blt_titan.bench.data import (
    MAX_PATCH_BYTES,
    ROWS_PER_BATCH,
    SHAPE,
    STREAMS,
    TARGET_BYTES_PER_S_AND_CORE,
    cpu_seconds,
    write_documents,
)
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.patcher import TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.fetch_counts import counted
from blt_titan.data.store.object_store import Fetching
from blt_titan.data.store.shards import ShardSet
from blt_titan.patching.rule import PatchRule
from blt_titan.progress import ProgressBar
from tests.helpers.s3_server import s3_server


def measure(place: str, share: float, workers: int) -> dict[str, float]:
    """Read a share of the data's text as rows; return rates, and what was fetched."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        shards = ShardSet(place, "train", fetching=Fetching(Path(cache)))
        patcher = TextPatcher(PatchRule("space", max_patch_bytes=MAX_PATCH_BYTES))
        source = RowSource(shards, patcher, SHAPE, 16 if shards.is_remote else 0)
        loader = RowLoader(
            source, StreamOrder(len(shards), STREAMS, 0), rows_per_batch=ROWS_PER_BATCH, num_workers=workers
        )
        before, n_bytes = counted(), 0
        batches = iter(loader)
        n_bytes += int((next(batches).layout.byte_doc_BS != PADDING).sum())
        measured_from, began, began_cpu = n_bytes, perf_counter(), cpu_seconds()
        while n_bytes < share * shards.text_bytes:
            n_bytes += int((next(batches).layout.byte_doc_BS != PADDING).sum())
        seconds, cpu_s, fetched = perf_counter() - began, cpu_seconds() - began_cpu, counted()
        return {
            "bytes_per_s": (n_bytes - measured_from) / seconds,
            "bytes_per_cpu_s": (n_bytes - measured_from) / cpu_s,
            "fetched_per_byte": (fetched.fetched_bytes - before.fetched_bytes) / n_bytes,
            "requests_per_mb": (fetched.requests - before.requests) / n_bytes * 1e6,
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-bytes", type=int, default=100_000_000, help="bytes of text (default %(default)s)")
    parser.add_argument("--shard-bytes", type=int, default=4_000_000, help="bytes of a shard (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="alternating measurements (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, s3_server():
        written = write_documents(Path(folder), args.text_bytes, 0, shard_bytes=args.shard_bytes)
        places = {"local": str(written), "file://": f"file://{written}"}
        for protocol, options in (("memory", {}), ("s3", {"skip_instance_cache": True})):
            fs = fsspec.filesystem(protocol, **options)
            fs.makedirs("/bench" if protocol == "memory" else "bench", exist_ok=True)
            for path in written.iterdir():
                if path.is_file():
                    fs.put_file(str(path), f"{'/' if protocol == 'memory' else ''}bench/data/{path.name}")
            places[f"{protocol}://"] = f"{protocol}://bench/data"
        ways = [(name, workers) for name in places for workers in (0, 1)]
        found: dict[str, list[dict[str, float]]] = {f"{name}, {workers} workers": [] for name, workers in ways}
        for name, workers in ProgressBar(ways * args.repetitions, desc="rows"):
            found[f"{name}, {workers} workers"].append(measure(places[name], 0.8, workers))
    medians = {
        way: {key: round(statistics.median(one[key] for one in each), 4) for key in each[0]}
        for way, each in found.items()
    }
    for way, median in medians.items():
        print(
            f"{way:<20}{median['bytes_per_s'] / 1e6:>8.1f} MB/s  {median['bytes_per_cpu_s'] / 1e6:>6.1f} MB/CPU-s  "
            f"{median['fetched_per_byte']:.3f} fetched per byte  {median['requests_per_mb']:.1f} requests per MB"
        )
    settings = {
        "text_bytes": args.text_bytes,
        "shard_bytes": args.shard_bytes,
        "repetitions": args.repetitions,
        "fetch_ahead": 16,
    }
    write_result(
        args.out,
        "object_stores",
        arguments,
        settings=settings,
        target_bytes_per_s_and_core=TARGET_BYTES_PER_S_AND_CORE,
        median=medians,
        all=found,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
