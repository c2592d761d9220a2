"""Measure how fast JSON lines become shards, hashing and global shuffle included, and whether memory is kept.

    python -m benchmarks.prepare_throughput --out benchmarks/results/prepare_throughput.json

Random words in documents of exponential lengths, as JSON lines in several files; `blt-titan prepare` as a process of
its own, with one worker and with two, for documents of mean 5 KB, 500 bytes and 30 bytes (a twentieth as much text,
for the memory that documents take beside their text). Speed is bytes of text by the clock and
by processor time of all its processes, start-up included. Memory is the sum of what its processes alone hold (their
private pages, and shared ones by share), looked at every 100 ms.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.result_file import write_result
from blt_titan.commands.arguments import size

POOL_BYTES = 20_000_000
FILES = 8
TARGET_BYTES_PER_S_AND_CORE = 40e6
POLL_S = 0.1


def write_lines(directory: Path, total_bytes: int, mean_bytes: int) -> None:
    """Write about `total_bytes` of text as JSON lines."""
    rng = np.random.default_rng(0)
    letters = rng.choice(list("etaoinshrdlucmfwypvbgkjqxz"), size=(20_000, 14))
    words = ["".join(row[: 1 + n]) for row, n in zip(letters, rng.poisson(3.7, 20_000).clip(max=13), strict=True)]
    lines, held = [], 0
    while held < POOL_BYTES:
        n_bytes = max(1, int(rng.exponential(mean_bytes)))
        text = " ".join(words[i] for i in rng.integers(len(words), size=n_bytes // 4 + 1))[:n_bytes]
        lines.append(json.dumps({"id": len(lines), "text": text, "url": "https://example.org/some/page"}) + "\n")
        held += len(text)
    pool = "".join(lines)
    for number in range(FILES):
        with (directory / f"{number}.jsonl").open("w") as file:
            for _ in range(max(1, round(total_bytes / POOL_BYTES / FILES))):
                file.write(pool)


def held_bytes(pid: int) -> int:
    """Sum what a process and its descendants hold, shared pages by share."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += held_bytes(int(child))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it has ended
    return total


def run(source: Path, out: Path, workers: int, memory: str) -> dict[str, float]:
    """Prepare once; return its figures."""
    command = [sys.executable, "-m", "blt_titan", "prepare", "--source", str(source), "--out", str(out)]
    command += ["--workers", str(workers), "--memory", memory, "--shard-bytes", "256MiB", "--no-progress"]
    command += ["--max-record-bytes", "16MiB"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, held_bytes(process.pid))
        time.sleep(POLL_S)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "text_bytes": counts["text_bytes"],
        "documents": counts["documents"],
        "seconds": seconds,
        "bytes_per_s_and_worker": counts["text_bytes"] / seconds / workers,
        "bytes_per_cpu_s": counts["text_bytes"] / cpu_s,
        "peak_memory_mib": peak / 2**20,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=size, default=size("1GB"), help="of each set of documents (default 1GB)")
    parser.add_argument("--memory", default="1GiB", help="what prepare_data may take (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (default %(default)s)")
    parser.add_argument("--folder", help="where the data is written for the time being (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    print(f"{'mean bytes':>10}{'workers':>9}{'MB/s per worker':>17}{'MB per CPU-second':>19}{'peak MiB':>10}")
    for mean_bytes, part in ((5000, 1), (500, 1), (30, 20)):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            source = Path(folder) / "source"
            source.mkdir()
            write_lines(source, args.text // part, mean_bytes)
            measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
            for number, workers in enumerate(tqdm([1, 2] * args.repetitions, desc="measuring", leave=False)):
                with tempfile.TemporaryDirectory(dir=args.folder) as out:
                    measured[workers].append(run(source, Path(out) / str(number), workers, args.memory))
        for workers, runs in measured.items():
            median = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            median["peak_memory_mib"] = max(one["peak_memory_mib"] for one in runs)
            results[f"mean {mean_bytes} B, {workers} workers"] = median | {"all": runs}
            print(
                f"{mean_bytes:>10}{workers:>9}{median['bytes_per_s_and_worker'] / 1e6:>17.1f}"
                f"{median['bytes_per_cpu_s'] / 1e6:>19.1f}{median['peak_memory_mib']:>10.0f}"
            )
    figures = {
        "memory": args.memory,
        "target_bytes_per_s_and_core": TARGET_BYTES_PER_S_AND_CORE,
        "median": results,
    }
    write_result(args.out, "prepare_throughput", arguments, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
