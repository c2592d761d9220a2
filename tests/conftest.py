import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two busy cores with two threads each spin more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _gpu_tests_begin_with_nothing_compiled(request):
    """FlexAttention has a limited number of variants in a process; a test uses up its own only."""
    if request.node.get_closest_marker("gpu"):
        import torch

        torch._dynamo.reset()


@pytest.fixture(scope="session")
def stdlib_data(tmp_path_factory) -> Path:
    """About 400 KB of the standard library as byte shards, with a held-out split: enough for a few steps."""
    directory = tmp_path_factory.mktemp("data") / "stdlib"
    subprocess.run(
        [
            *(sys.executable, "-m", "scripts.prepare_data", "--source", "python-stdlib", "--out", str(directory)),
            *("--validation-fraction", "0.1", "--seed", "3", "--max-bytes", "400KB", "--record-batch-bytes", "4KiB"),
            "--no-progress",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return directory


@pytest.fixture(scope="session")
def small_run(stdlib_data) -> list[str]:
    """Overrides that make train_configs/debug.toml a run of seconds: small rows, few streams, no TensorBoard."""
    return [
        f"--training.dataset_path={stdlib_data}",
        "--data.streams=12",
        "--data.segment_bytes=128",
        "--data.segment_patches=40",
        "--patching.max_patch_bytes=128",
        "--training.seq_len=256",
        "--training.local_batch_size=1",
        "--training.global_batch_size=4",
        "--training.steps=20",
        "--training.dataloader.num_workers=0",
        "--metrics.log_freq=1",
        "--metrics.no-enable-tensorboard",
        "--validation.no-enable",
        "--lr_scheduler.warmup_steps=2",
        "--lr_scheduler.total_steps=20",
    ]
