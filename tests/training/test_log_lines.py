"""What torchtitan logs on a CPU: nothing of GPUs' memory or of NCCL."""

import logging
import os
import subprocess
import sys

import pytest

from blt_titan.training.log_lines import LineFilter
from tests.helpers.training_runs import CONFIG_FILE

MEMORY = "CPU memory usage for model: -0.00GiB(-100.00%)"
NCCL = "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING] = 1 will be overridden to 3 based on job config"
STEP = "step      1  loss 6.08791 nats"


@pytest.mark.parametrize(
    ("device", "line", "passes"),
    [
        ("cpu", MEMORY, False),
        ("cpu", NCCL, False),
        ("cpu", STEP, True),
        ("cuda", NCCL, True),
        ("cuda", "CUDA memory usage for model: 1.00GiB(1.00%)", True),
        ("cuda", "Pipeline Parallel loss is not visible. Please add rank 1", False),
    ],
)
def test_lines_that_do_not_hold_are_dropped(device, line, passes):
    record = logging.LogRecord("root", logging.INFO, "", 0, line, None, None)
    assert LineFilter(device).filter(record) == passes


@pytest.mark.slow
def test_a_run_on_a_cpu_speaks_of_no_accelerator(small_run, tmp_path):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29591"}
    settings = [f"--job.config_file={CONFIG_FILE}", *small_run, f"--job.dump_folder={tmp_path}", "--training.steps=1"]
    done = subprocess.run(
        [sys.executable, "-m", "blt_titan.train", *settings],
        # As torchrun sets it.
        env=os.environ | alone | {"CUDA_VISIBLE_DEVICES": "", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout + done.stderr
    assert "step      1  loss" in said
    assert [word for word in ("GiB", "NCCL", "CUDA", "FLOPS", "nan") if word in said] == []
