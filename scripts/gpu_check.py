"""Run the GPU tests and short bf16 training runs, and write one JSON file; `scripts/gpu_check.sh` calls it.

python -m scripts.gpu_check --out benchmarks/results/gpu_check.json --flavor debug --steps 30
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from blt_titan.commands.arguments import Parser, output_file, whole, write_output
from blt_titan.commands.ending import command
from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.errors import DataError
from blt_titan.model.flavors import BLT_FLAVORS

CONFIG_FILE = "train_configs/debug.toml"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser("gpu_check", __doc__)
    add = parser.add_argument
    add("--out", type=output_file, default="benchmarks/results/gpu_check.json", metavar="FILE", help="file to write")
    add("--flavor", choices=BLT_FLAVORS, default="100M", help="model size of the training runs")
    add("--steps", type=whole(1, 10**9), default=30, metavar="N", help="steps of each training run")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command("gpu_check", DataError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Check and write; give the exit code: 1 if anything failed, after the JSON is written."""
    args = parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device is at hand; nothing was checked")
    if importlib.util.find_spec("pytest") is None:
        sys.exit("gpu_check: pytest is not installed; run make setup-dev")

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "stdlib"
        # Standard output is kept for the figures.
        prepare(
            ["python-stdlib"],
            data,
            validation_fraction=0.05,
            seed=0,
            max_bytes=16_000_000,
            record_batch_bytes=16 * 1024,
            progress=False,
        )
        result: dict[str, Any] = {
            "machine": _machine(),
            "command": " ".join(["scripts/gpu_check.sh", *sys.argv[1:]]),
            "tests": _tests(),
        }
        result["training"] = [
            _train(Path(folder), data, args.flavor, args.steps, compile_model) for compile_model in (False, True)
        ]
    result["ok"] = result["tests"]["exit_code"] == 0 and all(run["exit_code"] == 0 for run in result["training"])
    write_output(args.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


def _machine() -> dict[str, str | None]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _tests() -> dict[str, Any]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
    )
    return {
        "exit_code": done.returncode,
        "seconds": time.perf_counter() - began,
        "output_tail": (done.stdout + done.stderr).splitlines()[-15:],
    }


def _train(folder: Path, data: Path, flavor: str, steps: int, compile_model: bool) -> dict[str, Any]:
    out = folder / f"compile_{compile_model}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--rdzv_backend=c10d"),
        *("--rdzv_endpoint=localhost:0", "-m", "blt_titan.train", f"--job.config_file={CONFIG_FILE}"),
        f"--job.dump_folder={out}",
        f"--model.flavor={flavor}",
        f"--training.dataset_path={data}",
        f"--training.steps={steps}",
        *("--training.seq_len=16384", "--data.segment_bytes=4096", "--data.segment_patches=768"),
        *("--training.local_batch_size=4", "--training.global_batch_size=4"),
        *("--training.mixed_precision_param=bfloat16", "--optimizer.lr=4e-4", "--metrics.log_freq=5"),
        *("--training.dataloader.num_workers=4", "--checkpoint.no-enable", "--validation.no-enable"),
        "--compile.enable" if compile_model else "--compile.no-enable",
        "--compile.components=model",
    ]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "4"})
    lines = []
    if (out / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "compile": compile_model,
        "flavor": flavor,
        "exit_code": done.returncode,
        "seconds": time.perf_counter() - began,
        "metrics": lines,
        "output_tail": [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()[-40:],
    }


if __name__ == "__main__":
    sys.exit(main())
