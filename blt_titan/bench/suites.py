"""The suites by name, and a result of several of them."""

from collections.abc import Iterator, Sequence
from typing import Any

from blt_titan.bench import data, generation, scoring, training
from blt_titan.bench.environment import environment
from blt_titan.bench.options import Options, Suite
from blt_titan.bench.table import Table

SUITES: dict[str, Suite] = {
    **training.SUITES,
    "scoring": scoring.SUITE,
    "generation": generation.SUITE,
    "data": data.SUITE,
}


def run_suites(names: Sequence[str], options: Options, command: str) -> Iterator[dict[str, Any]]:
    """Run suites one after another.

    Args:
        names: of `SUITES`.
        options: what is measured, and how often.
        command: what was asked, for the record.

    Yields:
        After each suite the whole result so far: `command`, `machine`, `versions`, `commit` and `suites` by name. What
        stops a later suite leaves the earlier ones.
    """
    result: dict[str, Any] = {"command": command, **environment(), "suites": {}}
    for name in dict.fromkeys(names):
        result["suites"][name] = SUITES[name].run(options)
        yield result


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a result."""
    return [SUITES[name].table(figures) for name, figures in result["suites"].items()]


def failures(result: dict[str, Any]) -> list[str]:
    """Return a sentence for each peer that could not be measured."""
    return [
        f"{suite} {work['rows']} x {work['row_bytes']:,}: {name}: {peer['failed']}"
        for suite, figures in result["suites"].items()
        for work in figures.get("works", [])
        for name, peer in work["peers"].items()
        if "failed" in peer
    ]
