"""Peak memory of CPU runs, as a plan predicts it and as the kernel sees it.

    python -m benchmarks.plan_memory --out benchmarks/results/plan_memory_cpu.json

Each run is a real `blt-titan train` of a few steps. A module of the run (`experimental.custom_import`) notes what a
rank holds in memory of its own before its model is built, and looks every 2 ms for the peak; the difference is what
tensors, and all that comes with training them, take. Predicted is the peak of live tensors of the same rank's dry run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result_file import write_result
from blt_titan.commands.run_settings import config_file, run_arguments
from blt_titan.config.check import load_run_config
from blt_titan.config.rules.target import this_machine
from blt_titan.dry_run.run import dry_run
from blt_titan.plan.layout import layout_of, measured_ranks

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "fsdp 2": (2, ()),
    "cp 2": (2, ("--parallelism.context_parallel_degree=2",)),
    "tp 2": (2, ("--parallelism.tensor_parallel_degree=2",)),
    "pp 2": (2, ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2")),
    "fsdp 2 x cp 2": (4, ("--parallelism.context_parallel_degree=2",)),
}
ROW_BYTES = {"20M": 8_192, "100M": 4_096}
STEPS = 2
NOTING = """
import atexit, os, resource, threading, time
import torch, torch.distributed.checkpoint, torch._dynamo, torch.utils.tensorboard  # what a run imports sooner or later

statm = open("/proc/self/statm", "rb", buffering=0)

def own():
    # What is mapped from files, code above all, comes and goes as the kernel sees fit, and is no tensor.
    statm.seek(0)
    resident, shared = statm.read().split()[1:3]
    return (int(resident) - int(shared)) * resource.getpagesize()

def watch():
    global peak
    while True:
        peak = max(peak, own())
        time.sleep(0.002)

def note():
    with open(os.path.join(os.environ["NOTED"], os.environ["RANK"]), "w") as file:
        file.write(f"{base} {peak}")

if "RANK" in os.environ:
    base = peak = own()
    threading.Thread(target=watch, daemon=True).start()
    atexit.register(note)
"""
# What is freed goes back to the kernel, so that what is resident is what lives.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def overrides(flavor: str, layout: tuple[str, ...], data: Path, out: Path) -> list[str]:
    """Return the settings of a run."""
    row = ROW_BYTES[flavor]
    return [
        *(f"--model.flavor={flavor}", f"--training.dataset_path={data}", f"--job.dump_folder={out}"),
        *("--data.streams=12", "--data.segment_bytes=2048", "--data.segment_patches=512"),
        *("--patching.max_patch_bytes=512", f"--training.seq_len={row}", "--training.local_batch_size=1"),
        *("--training.global_batch_size=2", f"--training.steps={STEPS}", "--training.dataloader.num_workers=0"),
        *("--validation.no-enable", "--checkpoint.no-enable", "--metrics.no-enable-tensorboard"),
        *("--lr_scheduler.warmup_steps=1", f"--lr_scheduler.total_steps={STEPS}"),
        *layout,
    ]


def observe(settings: list[str], ranks: int, folder: Path) -> dict[int, int]:
    """Train, and return the bytes that each rank took over what it held before its model was built."""
    module, noted = folder / "noting_memory.py", folder / "noted"
    module.write_text(NOTING)
    noted.mkdir()
    environment = os.environ | ALLOCATOR | {"NOTED": str(noted), "PYTHONPATH": f"{folder}:{Path.cwd()}"}
    command = [sys.executable, "-m", "blt_titan", "train", "debug", "--nproc", str(ranks), *settings]
    command.append("--experimental.custom_import=noting_memory")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    noticed = {int(file.name): [int(word) for word in file.read_text().split()] for file in noted.iterdir()}
    return {rank: peak - base for rank, (base, peak) in noticed.items()}


def compare(flavor: str, name: str, data: Path) -> dict[str, Any]:
    """Return the predicted and the observed peaks of the ranks that a plan looks at."""
    ranks, layout = LAYOUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = overrides(flavor, layout, data, Path(folder, "run"))
        config = load_run_config(run_arguments(config_file("debug"), settings))
        observed = observe(settings, ranks, Path(folder))
        rows = []
        for rank in measured_ranks(layout_of(config, ranks)):
            found = dry_run(config, ranks, kernels=False, quiet=True, rank=rank, device="cpu", target=this_machine())
            predicted = found.memory.peak_bytes
            rows.append(
                {
                    "rank": rank,
                    "predicted_bytes": predicted,
                    "observed_bytes": observed[rank],
                    "observed_over_predicted": observed[rank] / predicted,
                }
            )
    return {"flavor": flavor, "layout": name, "row_bytes": ROW_BYTES[flavor], "ranks": rows}


def main() -> None:
    """Compare all, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flavor", action="append", choices=list(ROW_BYTES))
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        prepare = [
            *("prepare", "--source", "python-stdlib", "--out", str(data), "--seed", "0", "--max-bytes", "4MB"),
            *("--record-batch-bytes", "16KiB", "--no-progress"),
        ]
        subprocess.run([sys.executable, "-m", "blt_titan", *prepare], check=True, capture_output=True)
        found = []
        for flavor in args.flavor or ROW_BYTES:
            for name in args.layout or LAYOUTS:
                found.append(compare(flavor, name, data))
                print(json.dumps(found[-1]), flush=True)
    worst = max(abs(rank["observed_over_predicted"] - 1) for one in found for rank in one["ranks"])
    write_result(args.out, "plan_memory", None, runs=found, worst_difference=worst)


if __name__ == "__main__":
    main()
