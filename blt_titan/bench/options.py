"""What the suites are asked for, and what a suite is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from blt_titan.bench.rows import MEAN_PATCH_BYTES, Work
from blt_titan.bench.shapes import SHAPES
from blt_titan.bench.table import Table
from blt_titan.model.args import BLTArgs


@dataclass(frozen=True)
class Options:
    """What is measured, where, and how often."""

    shape: str = "bench"
    """A name of `shapes.SHAPES`."""
    works: tuple[tuple[int, int], ...] = ()
    """Rows and bytes of a row; empty for those of the suite."""
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    repeats: int = 5
    seed: int = 0
    tiny: bool = False
    """Sizes of a test: what is measured means nothing."""
    progress: bool = False

    @property
    def args(self) -> BLTArgs:
        """The shape of the model."""
        return SHAPES["tiny" if self.tiny else self.shape]

    def works_or(self, usual: Sequence[tuple[int, int]], tiny: Sequence[tuple[int, int]]) -> list[Work]:
        """Return the works that were asked for, else a suite's own."""
        chosen = self.works or (tiny if self.tiny else usual)
        return [Work(rows, n_bytes, MEAN_PATCH_BYTES) for rows, n_bytes in chosen]

    def settings(self) -> dict[str, Any]:
        """Return what a result says about how it was taken."""
        return {
            "shape": "tiny" if self.tiny else self.shape,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "repeats": self.repeats,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Suite:
    """Benchmarks that belong together."""

    summary: str
    run: Callable[[Options], dict[str, Any]]
    """Measure; what it returns can be written as JSON."""
    table: Callable[[dict[str, Any]], Table]
    """Show what `run` returned."""
