"""Dry runs of the shipped configurations on CUDA without a GPU, held to the bounds of `blt_titan/dry_run/bounds.toml`.

    python -m scripts.check_cuda
    python -m scripts.check_cuda --only blt_1b

Prints a line for each layout. Exit code 1 if one is not sound or holds more memory than its bound. Needs a CUDA build
of torch and no GPU; `make check-cuda` makes the venv and runs this.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from blt_titan.commands.arguments import Parser
from blt_titan.commands.ending import command
from blt_titan.commands.run_settings import config_file, run_arguments
from blt_titan.config.check import RunConfigError, load_run_config
from blt_titan.dry_run.bounds import MemoryBound, memory_bounds
from blt_titan.dry_run.cards import GIB
from blt_titan.dry_run.errors import DryRunError
from blt_titan.dry_run.result import DryRun
from blt_titan.dry_run.run import check_cuda_build, dry_run

NAME = "check_cuda"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__)
    configs = sorted({bound.config for bound in memory_bounds()})
    parser.add_argument("--only", choices=configs, help="one configuration (default all)")
    return parser


@command(NAME, RunConfigError, DryRunError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the dry runs; give the exit code: 0 if all are within their bounds, else 1."""
    args: argparse.Namespace = make_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    check_cuda_build()
    failed = False
    for bound in memory_bounds():
        if args.only not in (None, bound.config):
            continue
        config = load_run_config(run_arguments(config_file(bound.config), bound.overrides))
        found = dry_run(config, bound.world_size, name=name_of(bound), kernels=bound.kernels)
        faults = list(faults_of(found, bound))
        failed = failed or bool(faults)
        print(line_of(found, bound), *(f"  {fault}" for fault in faults), sep="\n", flush=True)
    return int(failed)


def name_of(bound: MemoryBound) -> str:
    """Return what a layout is called."""
    return " ".join([bound.config, *bound.overrides])


def faults_of(found: DryRun, bound: MemoryBound) -> Iterator[str]:
    """Yield what is wrong with a dry run, the bound on its memory included."""
    yield from found.faults()
    peak = found.memory.peak_bytes / GIB
    if peak > bound.most_gib:
        yield f"memory: {peak:.2f} GiB of tensors is above the bound of {bound.most_gib} GiB in bounds.toml"


def line_of(found: DryRun, bound: MemoryBound) -> str:
    """Return what a dry run found, on a line."""
    spills = sum(kernel.spills for kernel in found.kernels)
    kernels = f"{len(found.kernels)} kernels, {spills} spill" if found.kernels_made else "kernels not generated"
    verdict = "FAILED" if list(faults_of(found, bound)) else "ok"
    return (
        f"{verdict}  {name_of(bound)} on {found.world_size} x {found.gpu}, torch {found.torch}: "
        f"{found.memory.peak_bytes / GIB:.1f} of {bound.most_gib} GiB; host reads {len(found.host_reads)}, "
        f"graphs {len(found.graphs)}, {kernels}; {found.seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
