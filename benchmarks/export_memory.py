"""Measure how much memory it takes to export a checkpoint of a flavour's shapes, written by one rank.

    python -m benchmarks.export_memory --flavor 1B --folder /tmp --out benchmarks/results/export_memory.json

The weights are zeros, read from a file without content; what is measured does not look at them. One rank writes each
tensor as one piece, which is the hardest case: the hash tables of 1B are a piece of 12 GB. `blt-titan export` runs
as a process of its own; memory is its VmHWM, looked at until it ends. It needs disk for 1.5 times the fp32 weights.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

from benchmarks.result_file import write_result
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import BLT_FLAVORS, ENTROPY_FLAVORS
from blt_titan.patching.rule import PatchRule

ALLOWED_BESIDE_LARGEST = 2 * 10**9
POLL_S = 0.05


def fill_with_nothing(model: nn.Module, file: Path) -> nn.Module:
    """Give a module on the meta device parameters that are pages of a sparse file."""
    largest = max(parameter.numel() for parameter in model.parameters())
    with file.open("wb") as sparse:
        sparse.truncate(4 * largest)
    for name, parameter in list(model.named_parameters()):
        module_name, _, last = name.rpartition(".")
        flat = torch.from_file(str(file), shared=False, size=parameter.numel(), dtype=torch.float32)
        setattr(model.get_submodule(module_name), last, nn.Parameter(flat.view(parameter.shape), requires_grad=False))
    return model


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return the most memory that it held."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(POLL_S)
    if process.wait():
        raise RuntimeError(f"the export ended with exit code {process.returncode}")
    return peak


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="1B", choices=list(BLT_FLAVORS), help="default %(default)s")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="of the export (default %(default)s)")
    parser.add_argument("--folder", help="where files are written for the time being (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    blt_args, entropy_args = replace(BLT_FLAVORS[args.flavor]), replace(ENTROPY_FLAVORS["100M"])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder)
        with torch.device("meta"):
            models = {"blt": BLT(blt_args), "blt_entropy": EntropyModel(entropy_args)}
        largest = max(4 * math.prod(parameter.shape) for parameter in models["blt"].parameters())
        total = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
        rule = PatchRule("global", threshold=1.33544921875, max_patch_bytes=512)
        for name, model in models.items():
            fill_with_nothing(model, path / f"{name}.zeros")
            write_checkpoint(model, name, model.args, path / name, rule=rule)
        command = [sys.executable, "-m", "blt_titan", "export", "--checkpoint", str(path / "blt")]
        command += ["--entropy-checkpoint", str(path / "blt_entropy"), "--out", str(path / "hf"), "--dtype", args.dtype]
        began = time.perf_counter()
        peak = peak_bytes(subprocess.Popen(command))
        seconds = time.perf_counter() - began
        written = sum(file.stat().st_size for file in (path / "hf").iterdir())
    figures = {
        "flavor": args.flavor,
        "dtype": args.dtype,
        "parameters": total,
        "largest_tensor_bytes": largest,
        "peak_memory_bytes": peak,
        "allowed_bytes": largest + ALLOWED_BESIDE_LARGEST,
        "seconds": seconds,
        "bytes_written": written,
    }
    print(
        f"{args.flavor}: {total:,} parameters, largest tensor {largest / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB, "
        f"{written / 1e9:.2f} GB written in {seconds:.0f} s"
    )
    write_result(args.out, "export_memory", arguments, **figures)
    if peak > figures["allowed_bytes"]:
        print(f"more than the {figures['allowed_bytes'] / 1e9:.2f} GB that are allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
