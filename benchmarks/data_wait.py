"""Measure what share of a training step waits for data: the 20M model on scored text, patches by entropy.

    python -m benchmarks.data_wait --data outputs/demo/data --threshold 2.6221 --out benchmarks/results/data_wait.json

A short run of `run_train.sh` with one loader worker, as the demo leaves its data; the figure is the median of the
logged steps after the first, which holds start-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.result_file import write_result

GOAL = 0.01


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="byte shards with a sidecar of entropies")
    parser.add_argument("--threshold", type=float, required=True, help="nats, as `blt-titan calibrate` prints it")
    parser.add_argument("--flavor", default="20M", help="default %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"--job.dump_folder={folder}",
            f"--model.flavor={args.flavor}",
            f"--training.dataset_path={args.data}",
            f"--training.steps={args.steps}",
            "--training.seq_len=4608",
            "--data.segment_bytes=2304",
            "--data.segment_patches=512",
            "--patching.rule=global",
            f"--patching.threshold={args.threshold}",
            "--metrics.log_freq=1",
            "--validation.no-enable",
            "--checkpoint.no-enable",
        ]
        environment = os.environ | {"PYTHON": sys.executable, "NGPU": "1", "NNODES": "1"}
        subprocess.run(["./run_train.sh", *overrides], env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][1:]
    median = {
        key: statistics.median(line[key] for line in lines)
        for key in ("data_wait_share", "bytes_per_second", "mean_patch_bytes")
    }
    median["worst_data_wait_share"] = max(line["data_wait_share"] for line in lines)
    print(f"{args.flavor}: " + ", ".join(f"{key} {value:.4g}" for key, value in median.items()))
    figures = {
        "overrides": overrides[1:],
        "goal_data_wait_share": GOAL,
        "median": median,
    }
    write_result(args.out, "data_wait", arguments, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
