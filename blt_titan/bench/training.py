"""Suites of training: forward and backward against peers, memory, lengths of rows, lengths of patches."""

from dataclasses import replace
from typing import Any

from blt_titan.bench.in_turn import GIVES_BACK_FROM_BYTES, measure_in_turn, measure_memory, spec_of
from blt_titan.bench.options import Options, Suite
from blt_titan.bench.peers import OURS, PEERS
from blt_titan.bench.rows import Work
from blt_titan.bench.table import Table, megabytes, seconds, times
from blt_titan.bench.worker import same_loss

WORKS = ((2, 1_024), (1, 4_096), (1, 8_192), (1, 32_768))
TINY_WORKS = ((1, 256),)
MOST_BYTES_OF_TRANSFORMERS = 8_192
"""It has scores of all pairs of bytes: longer rows do not fit usefully."""
SCALES = tuple((1, 1024 * size) for size in (1, 2, 4, 8, 16, 32, 64))
SCALES_FROM = (1, 2_048)
"""Rates of other lengths are given as shares of this one's."""
PATCH_SIZES = (4.5, 6.0, 8.0)
PATCH_SIZE_WORKS = ((1, 8_192),)
PEAKS = 2
"""Peaks of memory that are measured: they hardly differ."""
SAME_MODEL = ("transformers", *OURS)


def _works(works: list[Work], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"rows": work.rows, "row_bytes": work.n_bytes, "patch_bytes": work.patch_bytes, "patch_slots": work.patch_slots}
        | figures
        for work, figures in zip(works, measured, strict=True)
    ]


def _can(name: str, work: Work) -> bool:
    return name != "transformers" or work.n_bytes <= MOST_BYTES_OF_TRANSFORMERS


def train_step(options: Options) -> dict[str, Any]:
    """Measure a forward and a backward of ours and of all peers.

    Raises:
        RuntimeError: models that must agree do not: what was measured would mean nothing.
    """
    works, measured = options.works_or(WORKS, TINY_WORKS), []
    for work in works:
        specs = {name: spec_of(name, work, options) for name in PEERS if _can(name, work)}
        peers = measure_in_turn(specs, options, f"train-step {work}")
        wrong = same_loss({name: peers[name]["loss"] for name in SAME_MODEL if "loss" in peers.get(name, {})})
        if wrong:
            raise RuntimeError(f"train-step {work}: {wrong}")
        ratios = {
            f"{peer}_over_{ours}": peers[peer]["median_s"] / peers[ours]["median_s"]
            for ours in OURS
            for peer in peers
            if peer not in OURS and "median_s" in peers[peer] and "median_s" in peers[ours]
        }
        given_back = options.device == "cpu" and work.total_bytes >= GIVES_BACK_FROM_BYTES
        measured.append({"peers": peers, "ratios": ratios, "gives_memory_back_between_steps": given_back})
    return {"settings": options.settings(), "works": _works(works, measured)}


def memory(options: Options) -> dict[str, Any]:
    """Measure the memory of a step over that of the process before it."""
    works, measured = options.works_or(WORKS, TINY_WORKS), []
    for work in works:
        specs = {name: spec_of(name, work, options) for name in SAME_MODEL if _can(name, work)}
        peers = measure_memory(specs, options, f"memory {work}", peaks=PEAKS)
        base = peers.get("transformers", {}).get("peak_bytes")
        ratios = {
            f"{ours}_over_transformers": peers[ours]["peak_bytes"] / base
            for ours in OURS
            if base and "peak_bytes" in peers[ours]
        }
        measured.append({"peers": peers, "ratios": ratios})
    return {"settings": options.settings(), "works": _works(works, measured)}


def scaling(options: Options) -> dict[str, Any]:
    """Measure rows of other lengths, each in turn with one of 2,048 bytes."""
    works = options.works_or(SCALES, TINY_WORKS)
    base = Work(*((1, 128) if options.tiny else SCALES_FROM))
    measured = []
    for work in works:
        peers, ratios = {}, {}
        for ours in OURS:
            pair = {ours: spec_of(ours, work, options), f"{ours}_base": spec_of(ours, base, options)}
            found = measure_in_turn(pair, options, f"scaling {work} {ours}")
            peers |= found
            rate, base_rate = (found[name].get("bytes_per_s") for name in pair)
            if rate and base_rate:
                ratios[f"{ours}_rate_over_base"] = rate / base_rate
        measured.append({"peers": peers, "ratios": ratios})
    settings = options.settings() | {"base_row_bytes": base.n_bytes}
    return {"settings": settings, "works": _works(works, measured)}


def patch_size(options: Options) -> dict[str, Any]:
    """Measure rows of the same bytes in longer patches."""
    works, measured = [], []
    for work in options.works_or(PATCH_SIZE_WORKS, TINY_WORKS):
        by_size = [replace(work, patch_bytes=size) for size in PATCH_SIZES]
        found: list[dict[str, Any]] = [{"peers": {}, "ratios": {}} for _ in by_size]
        for ours in OURS:
            specs = {str(one.patch_bytes): spec_of(ours, one, options) for one in by_size}
            peers = measure_in_turn(specs, options, f"patch-size {work} {ours}")
            first = peers[str(PATCH_SIZES[0])].get("bytes_per_s")
            for into, figures in zip(found, peers.values(), strict=True):
                into["peers"][ours] = figures
                if first and "bytes_per_s" in figures:
                    into["ratios"][f"{ours}_rate_over_{PATCH_SIZES[0]}"] = figures["bytes_per_s"] / first
        works += by_size
        measured += found
    return {"settings": options.settings(), "works": _works(works, measured)}


def _named(work: dict[str, Any]) -> str:
    return f"{work['rows']} x {work['row_bytes']:,}"


def _shown(figures: dict[str, Any] | None, key: str, show: Any) -> str:
    if figures is None:
        return "-"
    return "failed" if "failed" in figures else show(figures[key])


def _ratio(work: dict[str, Any], name: str) -> str:
    return times(work["ratios"][name]) if name in work["ratios"] else "-"


def _title(result: dict[str, Any], what: str) -> str:
    settings = result["settings"]
    threads = "one thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    unit = f"CPU seconds, {threads}" if settings["device"] == "cpu" else f"seconds on {settings['device']}"
    return f"{what}: model {settings['shape']}, {settings['dtype']}, {unit}, medians of {settings['repeats']}"


def train_step_table(result: dict[str, Any]) -> Table:
    """Show times of a step, and how many times as fast ours is as others."""
    names = ["transformers", *OURS, "llama", "floor"]
    header = ["rows x bytes", *names, "transformers / eager", "/ compiled", "llama / eager", "/ compiled"]
    rows = [
        [
            _named(work),
            *(_shown(work["peers"].get(name), "median_s", seconds) for name in names),
            *(_ratio(work, f"{peer}_over_{ours}") for peer in ("transformers", "llama") for ours in OURS),
        ]
        for work in result["works"]
    ]
    return Table(_title(result, "forward and backward"), header, rows)


def memory_table(result: dict[str, Any]) -> Table:
    """Show peaks of memory."""
    header = ["rows x bytes", *SAME_MODEL, "eager / transformers", "compiled / transformers"]
    rows = [
        [
            _named(work),
            *(_shown(work["peers"].get(name), "peak_bytes", megabytes) for name in SAME_MODEL),
            *(_ratio(work, f"{ours}_over_transformers") for ours in OURS),
        ]
        for work in result["works"]
    ]
    settings = result["settings"]
    title = f"memory of a forward and a backward over the base: model {settings['shape']}, {settings['dtype']}"
    return Table(title, header, rows)


def scaling_table(result: dict[str, Any]) -> Table:
    """Show rates, and their shares of that of the base."""
    base = result["settings"]["base_row_bytes"]
    header = ["rows x bytes", *(f"{ours} bytes/s" for ours in OURS), *(f"{ours} / {base:,}" for ours in OURS)]
    rows = [
        [
            _named(work),
            *(_shown(work["peers"].get(ours), "bytes_per_s", "{:,.0f}".format) for ours in OURS),
            *(_ratio(work, f"{ours}_rate_over_base") for ours in OURS),
        ]
        for work in result["works"]
    ]
    return Table(_title(result, "lengths of rows"), header, rows)


def patch_size_table(result: dict[str, Any]) -> Table:
    """Show rates, and how many times that of the shortest patches they are."""
    header = ["rows x bytes, patch", *(f"{ours} bytes/s" for ours in OURS)]
    header += [f"{ours} / {PATCH_SIZES[0]}" for ours in OURS]
    rows = [
        [
            f"{_named(work)}, {work['patch_bytes']:g}",
            *(_shown(work["peers"].get(ours), "bytes_per_s", "{:,.0f}".format) for ours in OURS),
            *(_ratio(work, f"{ours}_rate_over_{PATCH_SIZES[0]}") for ours in OURS),
        ]
        for work in result["works"]
    ]
    return Table(_title(result, "lengths of patches"), header, rows)


SUITES = {
    "train-step": Suite(
        "a forward and a backward against transformers, a Llama, the products", train_step, train_step_table
    ),
    "memory": Suite("memory of a forward and a backward", memory, memory_table),
    "scaling": Suite("rows of 1 to 64 KiB", scaling, scaling_table),
    "patch-size": Suite("patches of 4.5, 6 and 8 bytes", patch_size, patch_size_table),
}
