"""Write the figures of README and docs/results.md from the files in `benchmarks/results/`, and from nothing else.

    python -m benchmarks.tables

Between two marks on either page stands what this makes; a test compares them. A result of `blt-titan bench` is any file
there with `suites`, and gives its tables as they are printed; the other files have a line each.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt_titan.bench.suites import SUITES
from blt_titan.commands.bench import described

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
README, PAGE = ROOT / "README.md", ROOT / "docs/results.md"
BEGIN, END = "<!-- figures: python -m benchmarks.tables -->", "<!-- end of figures -->"
IN_README = ("train-step", "memory", "scaling")
NOT_YET = (
    "Not measured at this state of the code: `blt-titan bench train-step memory scaling --out "
    "benchmarks/results/bench_cpu.json`."
)


@dataclass(frozen=True)
class Line:
    """A line of figures from one file."""

    file: str
    what: str
    shown: Callable[[dict[str, Any]], str]
    in_readme: bool = False


def _rows_out(result: dict[str, Any]) -> str:
    median = result["median"]["num_workers_1"]
    by_clock, by_cpu = median["bytes_per_s"] / 1e6, median["bytes_per_cpu_s"] / 1e6
    return f"{by_clock:.1f} MB/s by the clock, {by_cpu:.1f} MB per CPU-second of worker and trainer together"


def _prepared(mean: int) -> Callable[[dict[str, Any]], str]:
    def shown(result: dict[str, Any]) -> str:
        found = [result["median"][f"mean {mean} B, {workers} workers"] for workers in (1, 2)]
        rates, peaks = zip(*((f["bytes_per_s_and_worker"] / 1e6, f["peak_memory_mib"]) for f in found), strict=True)
        return (
            f"{rates[0]:.0f} MB/s with one worker, {rates[1]:.0f} MB/s each with two; {peaks[0]:.0f} and "
            f"{peaks[1]:.0f} MiB of memory where {result['memory']} was allowed"
        )

    return shown


def _scored(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {found['speed_up']:.2f} times, {found['share_of_possible']:.2f}"
        for name, found in result["sets"].items()
    )


def _generated(flavor: str) -> Callable[[dict[str, Any]], str]:
    def shown(result: dict[str, Any]) -> str:
        found = result[flavor]
        return (
            f"{found['bytes'] / found['seconds']:.1f} bytes/s: {found['times_transformers']:.1f} times "
            f"`transformers`, {found['times_bound']:.2f} times the least that weights, caches and FLOPs take"
        )

    return shown


def _by_length(result: dict[str, Any]) -> str:
    return ", ".join(f"{ms:.0f} ms after {int(n):,}" for n, ms in result["ms_per_byte_by_length"].items())


def _exported(result: dict[str, Any]) -> str:
    return f"{result['peak_memory_bytes'] / 1e9:.1f} GB of memory, {result['seconds']:.0f} s"


def _opened(result: dict[str, Any]) -> str:
    found = result["shards"]["18000"]
    return (
        f"{found['open_s']:.2f} s, {found['first_row_s']:.2f} s, {found['memory_mb']:.0f} MB of memory; "
        f"{found['memory_after_rows_mb']:.0f} MB after 256 rows of as many streams"
    )


def _waited(result: dict[str, Any]) -> str:
    median = result["median"]
    return f"{median['data_wait_share']:.3%} (the worst of 20 steps: {median['worst_data_wait_share']:.3%})"


def _local_models(result: dict[str, Any]) -> str:
    ratio = result["context_over_repeated"]
    return f"{ratio['median_seconds_per_step']:.2f} of the time, {ratio['bytes_sent_by_all_ranks']:.2f} of the bytes"


def _demo(result: dict[str, Any]) -> str:
    return (
        f"held-out {result['heldout_bits_per_byte_start']:.3f} to {result['heldout_bits_per_byte_end']:.3f} bits per "
        f"byte in {result['steps']} steps, {result['bytes_per_second'] / 1000:.1f} kB/s; gzip -9 "
        f"{result['gzip_bits_per_byte']:.3f}"
    )


LINES = [
    Line("demo_summary", "the demo: a debug model on two CPU cores", _demo),
    Line("prepare_throughput", "JSON lines to shards, shuffled, documents of 5 KB", _prepared(5000), in_readme=True),
    Line("prepare_throughput", "the same, documents of 500 B", _prepared(500)),
    Line(
        "loader_throughput_scored",
        "rows out of the loader, patches by entropy, documents of 5 KB, one worker, transfer included",
        _rows_out,
        in_readme=True,
    ),
    Line("loader_throughput", "rows out of the loader, patches at spaces, the same", _rows_out),
    Line("data_wait", "share of a step of the 20M model that waits for data", _waited, in_readme=True),
    Line("start_up", "opening 18,000 shards of 4.5 TB, and the first row", _opened, in_readme=True),
    Line(
        "scoring_throughput",
        "scoring in lanes, speed-up over one padded document at a time, and share of what padding allows",
        _scored,
        in_readme=True,
    ),
    Line(
        "generation",
        "cached generation, batch 1, 256 bytes after a prompt of 256, 100M with the 100M entropy model",
        _generated("100M"),
        in_readme=True,
    ),
    Line("generation", "the same with the 20M", _generated("20M")),
    Line("generation", "the 100M up to 4,096 bytes, per byte", _by_length),
    Line("export_memory", "export of a 1B checkpoint (one piece of 12.3 GB among its tensors) to bf16", _exported),
    Line(
        "byte_world", "local models split over cp x tp, against repeated over tp: a step on four ranks", _local_models
    ),
]


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return all results by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def of_bench(results: dict[str, dict[str, Any]], *, readme: bool) -> Iterator[str]:
    """Yield the tables of a page's suites, each with its file, and where a result was taken."""
    suites = IN_README if readme else tuple(SUITES)
    for name, result in results.items():
        shown = {suite: figures for suite, figures in result.get("suites", {}).items() if suite in suites}
        for suite, figures in shown.items():
            table = SUITES[suite].table(figures)
            yield f"{table.title} ({_file(name, readme=readme)}):\n\n{table.markdown()}"
        if shown:
            yield f"{described(result)}."


def lines_of(results: dict[str, dict[str, Any]], *, readme: bool) -> str:
    """Return the table of the other files."""
    rows = []
    for line in LINES:
        result = results.get(line.file)
        if result is not None and (line.in_readme or not readme):
            where = f"{_file(line.file, readme=readme)}, {_cpu(result)}"
            rows.append(f"| {line.what} | {line.shown(result)} | {where} |")
    return "\n".join(["| what | result | file, machine |", "|---|---|---|", *rows])


def _file(name: str, *, readme: bool) -> str:
    # The site has the pages of docs alone, so that a link from there would lead nowhere.
    return f"[{name}.json](benchmarks/results/{name}.json)" if readme else f"`{name}.json`"


def _cpu(result: dict[str, Any]) -> str:
    machine = result.get("machine")
    return f"{machine['cpu']}, {machine['cores']} cores" if machine else "two CPU cores"


def section(results: dict[str, dict[str, Any]], *, readme: bool) -> str:
    """Return what stands between the marks of a page."""
    return "\n\n".join([*(list(of_bench(results, readme=readme)) or [NOT_YET]), lines_of(results, readme=readme)])


def with_section(page: str, made: str) -> str:
    """Return a page with what stands between its marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page lacks {BEGIN} or {END}"
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """Return both pages as they should be."""
    results = read_results()
    return {path: with_section(path.read_text(), section(results, readme=path == README)) for path in (README, PAGE)}


def main() -> int:
    for path, text in pages().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
