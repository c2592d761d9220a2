"""The layouts that are compared with the single process, as data; docs/layouts.md is printed from it.

python -m tests.helpers.layouts            # print the matrix
python -m tests.helpers.layouts --write    # put it into docs/layouts.md
"""

import sys
from dataclasses import dataclass
from pathlib import Path

GLOBAL_ROWS = 8


@dataclass(frozen=True)
class Layout:
    """Degrees of a layout and how its share of the global batch is cut."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1F1B"
    micro_rows: int = 1
    """Rows of a pipeline micro-batch."""
    short: bool = False
    """Context slices shorter than the window: a byte's window begins up to four slices back."""
    hash_sharding: str = "columns"
    compiled: bool = False
    quick: bool = False
    """Part of `make test`; the rest is run by `make test-full`."""

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def name(self) -> str:
        degrees = [
            f"{axis}{getattr(self, axis)}"
            for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp")
            if getattr(self, axis) > 1
        ]
        extras = [self.schedule] if self.pp > 1 else []
        extras += [f"micro{self.micro_rows}"] if self.micro_rows > 1 else []
        extras += ["short"] if self.short else []
        extras += ["fsdp_tables"] if self.hash_sharding == "fsdp" else []
        extras += ["compiled"] if self.compiled else []
        return "-".join(degrees + extras)

    @property
    def local_rows(self) -> int:
        """Rows of half a step on each data-parallel rank: gradients accumulate over two."""
        rows = GLOBAL_ROWS // (self.dp_replicate * self.dp_shard)
        assert rows % 2 == 0, f"{self.name}: an odd number of rows on a rank"
        return rows // 2

    @property
    def overrides(self) -> list[str]:
        lines = {
            "parallelism.data_parallel_replicate_degree": self.dp_replicate,
            "parallelism.data_parallel_shard_degree": self.dp_shard,
            "parallelism.context_parallel_degree": self.cp,
            "parallelism.tensor_parallel_degree": self.tp,
            "parallelism.pipeline_parallel_degree": self.pp,
            "parallelism.pipeline_parallel_schedule": self.schedule,
            "parallelism.pipeline_parallel_microbatch_size": self.micro_rows,
            "training.local_batch_size": self.local_rows,
            "hash_embedding.sharding": self.hash_sharding,
            # 512 bytes in 8 segments, or 256 bytes in 8 of 32, half the window of the debug model.
            "training.seq_len": 256 if self.short else 512,
            "data.segment_bytes": 32 if self.short else 64,
            "data.segment_patches": 12 if self.short else 20,
            "patching.max_patch_bytes": 16 if self.short else 32,
        }
        compiled = ["--compile.enable", "--activation_checkpoint.mode=none"]
        return [*(f"--{key}={value}" for key, value in lines.items()), *(compiled if self.compiled else [])]


SINGLE = Layout()
SINGLE_SHORT = Layout(short=True)

LAYOUTS = [
    # Each axis alone.
    Layout(dp_shard=2, quick=True),
    Layout(dp_replicate=2),
    Layout(cp=2, quick=True),
    Layout(tp=2, quick=True),
    Layout(pp=2, quick=True),
    Layout(dp_shard=4),
    Layout(dp_replicate=4),
    Layout(cp=4),
    Layout(tp=4),
    Layout(pp=4),
    # Pipeline schedules.
    Layout(pp=2, schedule="GPipe"),
    Layout(pp=2, schedule="GPipe", micro_rows=2),
    Layout(pp=2, schedule="Interleaved1F1B"),
    Layout(pp=2, schedule="InterleavedZeroBubble", quick=True),
    # Every pair.
    Layout(dp_replicate=2, dp_shard=2),
    Layout(dp_replicate=2, cp=2),
    Layout(dp_replicate=2, tp=2),
    Layout(dp_replicate=2, pp=2),
    Layout(dp_shard=2, cp=2),
    Layout(dp_shard=2, tp=2),
    Layout(dp_shard=2, pp=2, schedule="InterleavedZeroBubble"),
    Layout(cp=2, tp=2, quick=True),
    Layout(cp=2, pp=2, schedule="Interleaved1F1B"),
    Layout(tp=2, pp=2),
    # Triples.
    Layout(dp_shard=2, tp=2, pp=2),
    Layout(dp_shard=2, cp=2, pp=2, schedule="InterleavedZeroBubble"),
    Layout(cp=2, tp=2, pp=2),
    Layout(dp_replicate=2, dp_shard=2, tp=2),
    Layout(dp_shard=2, cp=2, tp=2),
    # The tables sharded by FSDP, for comparison and as fallback.
    Layout(dp_shard=2, hash_sharding="fsdp"),
    Layout(dp_replicate=2, tp=2, hash_sharding="fsdp"),
    # Compiled blocks.
    Layout(dp_shard=2, compiled=True),
    Layout(tp=2, compiled=True, quick=True),
    Layout(dp_shard=2, tp=2, compiled=True),
    Layout(tp=2, pp=2, compiled=True),
]

SHORT_LAYOUTS = [
    Layout(cp=2, short=True),
    Layout(cp=4, short=True, quick=True),
    Layout(tp=4, short=True),
    Layout(cp=2, tp=2, short=True),
]


def matrix() -> str:
    """Return the support matrix as a Markdown table."""
    lines = [
        "| ranks | dp_replicate | dp_shard | cp | tp | pp | schedule | remarks |",
        "|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for layout in sorted([*LAYOUTS, *SHORT_LAYOUTS], key=lambda layout: layout.ranks):
        remarks = ["`make test`"] if layout.quick else []
        remarks += ["slices shorter than the window"] if layout.short else []
        remarks += ['`hash_embedding.sharding = "fsdp"`'] if layout.hash_sharding == "fsdp" else []
        remarks += ["`compile.enable = true`"] if layout.compiled else []
        remarks += [f"micro-batches of {layout.micro_rows} rows"] if layout.micro_rows > 1 else []
        degrees = (layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp, layout.pp)
        cells = [layout.ranks, *degrees, layout.schedule if layout.pp > 1 else "", ", ".join(remarks)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


BEGIN, END = "<!-- layouts: python -m tests.helpers.layouts --write -->", "<!-- end of layouts -->"
PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"


def with_matrix(page: str) -> str:
    """Return the page with the matrix of today between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{matrix()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(with_matrix(PAGE.read_text()))
    else:
        print(matrix())
