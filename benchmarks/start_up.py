"""Measure how long a loader over terabytes takes to open and to give its first row, and what memory that costs.

    python -m benchmarks.start_up --out benchmarks/results/start_up.json

The largest data set is 18,000 shards of 250 MB, 4.5 TB by its manifest: one shard of random words, and hard links to
it, because opening asks for names, sizes and digests, which are all there. Each size is measured in a fresh process;
memory is what opening and the first row add to a process that has imported everything. Files are in the page cache; a
network file system would add a round trip for each of two files of a shard.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from benchmarks.result_file import write_result
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.patcher import TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.manifest import Counts, Manifest, write_manifest
from blt_titan.data.store.shards import ShardSet, ShardWriter, install
from blt_titan.patching.rule import PatchRule

SIZES = (4_500, 9_000, 18_000)
STREAMS = 30_720
SHAPE = RowShape(segments=8, segment_bytes=2048, segment_patches=512)
MORE_ROWS = 256
"""Rows read after the first, each from another stream, which then all hold a record batch or two."""
GOALS = {"open_s": 5, "first_row_s": 10, "memory_mb": 300}


def write_data(directory: Path, shard_bytes: int) -> None:
    """Write one shard, as `data/` with a manifest."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=n)) for n in rng.integers(1, 10, size=5000)]
    directory.mkdir()
    writer = ShardWriter(directory, "train", record_batch_bytes=256 * 1024, shard_bytes=2**40)
    text = b" ".join(words[i] for i in rng.integers(5000, size=400_000))
    written = 0
    with tqdm(total=shard_bytes, unit="B", unit_scale=True, desc="writing a shard") as bar:
        while written < shard_bytes:
            begin, size = int(rng.integers(len(text) // 2)), int(rng.exponential(5000)) + 1
            writer.add(pa.array([str(written)]), pa.array([text[begin : begin + size]]))
            written += size
            bar.update(size)
    entries = writer.finish()
    install(directory, entries)
    documents, text_bytes = (sum(getattr(entry, key) for entry in entries) for key in ("documents", "text_bytes"))
    counts = Counts(documents, text_bytes, 0, 0, 0)
    write_manifest(directory, Manifest({}, counts, {"train": entries, "validation": ()}))


def link_shards(one: Path, many: Path, count: int) -> None:
    """Make a data set of `count` names for one shard."""
    [entry] = json.loads((one / "manifest.json").read_text())["splits"]["train"]
    many.mkdir()
    shards = []
    for number in range(count):
        names = {"file": f"train-{number:05d}.arrow", "index_file": f"train-{number:05d}.index.npy"}
        for key, name in names.items():
            os.link(one / entry[key], many / name)
        shards.append(entry | names)
    manifest = json.loads((one / "manifest.json").read_text())
    manifest["splits"]["train"] = shards
    (many / "manifest.json").write_text(json.dumps(manifest))


def status_kb(key: str) -> int:
    """Return a figure of this process in KB: VmRSS, what it holds, or VmHWM, the most that it ever held."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0])


def measure(directory: str) -> dict[str, float]:
    """Open a data set and take a row, in this process."""
    before = status_kb("VmRSS")
    began = time.perf_counter()
    shards = ShardSet(directory, "train")
    opened = time.perf_counter() - began
    patcher = TextPatcher(PatchRule("space", max_patch_bytes=512))
    order = StreamOrder(len(shards), STREAMS, 0)
    loader = RowLoader(RowSource(shards, patcher, SHAPE), order, rows_per_batch=1)
    batches = iter(loader)
    next(batches)
    first_row, memory_kb = time.perf_counter() - began, status_kb("VmHWM") - before
    for _ in range(MORE_ROWS):
        next(batches)
    return {
        "open_s": opened,
        "first_row_s": first_row,
        "memory_mb": memory_kb / 1e3,
        "memory_after_rows_mb": (status_kb("VmHWM") - before) / 1e3,
        "text_bytes": shards.text_bytes,
        "record_batches": len(shards),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard-bytes", type=int, default=250_000_000, help="text of a shard (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="fresh processes of each size (default %(default)s)")
    parser.add_argument("--folder", help="where the data is written for the time being (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_data(Path(folder) / "one", args.shard_bytes)
        for count in SIZES:
            directory = Path(folder) / str(count)
            link_shards(Path(folder) / "one", directory, count)
            command = [sys.executable, "-m", "benchmarks.start_up", "--measure", str(directory)]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(args.repetitions)]
            results[count] = {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]}
            print(count, "shards:", {key: round(value, 3) for key, value in results[count].items()})
    figures = {
        "row": dataclasses.asdict(SHAPE),
        "streams": STREAMS,
        "goals": GOALS,
        "shards": results,
    }
    write_result(args.out, "start_up", arguments, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
