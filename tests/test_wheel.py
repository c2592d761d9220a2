"""A wheel, installed into an empty environment, gives a command that works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("blt_titan", "parallelisms", "train_configs", "pyproject.toml", "README.md", "LICENSE")
SMALL = [
    *("--data.streams=12", "--training.steps=2", "--training.local_batch_size=1", "--metrics.log_freq=1"),
    *("--validation.no-enable", "--metrics.no-enable-tensorboard", "--training.dataloader.num_workers=0"),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The environment with the wheel; what the wheel requires comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a copy, because building leaves files where it builds
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(tree)],
        check=True,
    )
    shutil.rmtree(tree)
    (wheel,) = folder.glob("blt_titan-*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    subprocess.run(
        [*pip, f"--python={environment}/bin/python", "install", "--no-deps", "--no-index", str(wheel)], check=True
    )
    # As a path and not as a site directory: an editable installation there stays unseen.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(installed / "bin" / command[0]), *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel_holds_both_packages_their_types_pages_and_configurations(installed, tmp_path):
    (site,) = installed.glob("lib/python*/site-packages")
    tops = {path.name for path in site.iterdir() if path.suffix not in (".dist-info", ".pth")}
    assert tops == {"blt_titan", "parallelisms"}
    for name in ("blt_titan/py.typed", "parallelisms/py.typed", "blt_titan/plots/page.html"):
        assert (site / name).exists(), name
    shipped = {path.name: path.read_text() for path in (site / "blt_titan/train_configs").iterdir()}
    assert shipped == {path.name: path.read_text() for path in (ROOT / "train_configs").iterdir()}
    found = run(installed, tmp_path, "python", "-c", "import blt_titan, parallelisms as p; print(blt_titan, p)")
    assert found.stdout.count(str(site)) == 2, found.stderr


def test_prepare_train_and_generate_outside_the_checkout(installed, tmp_path):
    for command in (
        [
            *("prepare", "--source", "python-stdlib", "--out", "data/stdlib", "--max-bytes", "400KB"),
            *("--record-batch-bytes", "4KiB", "--validation-fraction", "0.1", "--seed", "3", "--no-progress"),
        ],
        ["config", "debug", "--check", *SMALL],
        ["train", "debug", *SMALL],
        ["generate", "--model", "outputs/debug", "--prompt", "import ", "--max-bytes", "8"],
    ):
        done = run(installed, tmp_path, "blt-titan", *command)
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert done.stdout.endswith("\n")
    assert len((tmp_path / "outputs/debug/metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "outputs"]


def test_doctor_finds_the_requirements_of_the_wheel(installed, tmp_path):
    done = run(installed, tmp_path, "blt-titan", "doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["missing"]) == (0, [])
    assert found["versions"]["torchtitan"] == "0.2.2"
