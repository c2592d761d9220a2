"""A wheel built from the tree holds both packages and runs outside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_wheel_installs_both_packages_and_runs(tmp_path, stdlib_data):
    # A copy, because building leaves files in the tree that it builds from.
    tree = tmp_path / "tree"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)],
        check=True,
    )
    (wheel,) = tmp_path.glob("blt_titan-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"blt_titan", "parallelisms"}

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "blt_titan.train", "--job.config_file", str(ROOT / "train_configs/debug.toml")),
            *(f"--training.dataset_path={stdlib_data}", "--data.streams=12", "--training.steps=2"),
            *("--metrics.log_freq=1", "--validation.no-enable"),
        ],
        cwd=elsewhere,
        env=os.environ
        | {"PYTHONPATH": str(installed), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29573"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((elsewhere / "outputs/debug/metrics.jsonl").read_text().splitlines()) == 2
