"""Ranks that were started with other settings, or on other data, are told so before they train."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from blt_titan.commands import prepare
from blt_titan.config.read import RunConfigError
from blt_titan.data.store.errors import DataError
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import train

pytestmark = pytest.mark.slow


def start(folder: str, overrides: list[str], starts: dict[str, list[str]]) -> dict[str, str]:
    said = {}
    for name, others in starts.items():
        others = others if dist.get_rank() else []
        try:
            train(f"{folder}/{name}", *overrides, "--training.steps=1", *others)
            said[name] = "trained"
        except (RunConfigError, DataError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return said


def test_ranks_compare_settings_and_data(small_run, stdlib_data, tmp_path):
    shutil.copytree(stdlib_data, tmp_path / "copy")
    other = tmp_path / "other"
    arguments = ["--source", "python-stdlib", "--out", str(other), "--max-bytes", "300KB", "--seed", "4"]
    assert prepare.main([*arguments, "--validation-fraction", "0.1", "--record-batch-bytes", "4KiB"]) == 0
    starts = {
        "settings": ["--optimizer.lr=0.25", "--training.max_norm=2.0"],
        "a copy": [f"--training.dataset_path={tmp_path / 'copy'}"],
        "other data": [f"--training.dataset_path={other}"],
    }
    first, second = run_distributed(start, 2, str(tmp_path), small_run, starts)
    assert first == second, "all ranks end alike"
    lr, max_norm = first["settings"].splitlines()
    assert lr.startswith("RunConfigError: optimizer.lr differs among the ranks of this run: 0.008 on rank 0 (")
    assert "), 0.25 on rank 1 (" in lr
    assert max_norm.startswith("training.max_norm differs among the ranks of this run: 1.0 on rank 0 (")
    assert first["a copy"] == "trained"
    assert first["other data"].startswith("DataError: the ranks of this run read different data: data.fingerprint is ")
    assert not list(Path(tmp_path, "settings").glob("checkpoint"))
