"""Stages that start processes: the tests that need a GPU, and a whole run with a validation and a checkpoint."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blt_titan.data.prepare.job import prepare
from blt_titan.gpu_check.stage import Place, Stage, StageError

ROOT = Path(__file__).parents[2]
TINY_TESTS = "tests/test_byte_vocab.py"
RUN_TIMEOUT_S = 540


def _call(command: list[str], cwd: Path, place: Place, **environment: str) -> dict[str, Any]:
    began = time.perf_counter()
    hidden = {} if place.is_cuda else {"CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            env=os.environ | hidden | environment,
        )
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, said = 124, f"stopped after {RUN_TIMEOUT_S} s: {error.stdout or b''!r}"
    return {"exit_code": code, "seconds": time.perf_counter() - began, "output_tail": said.splitlines()[-40:]}


def tests(place: Place) -> Iterator[dict[str, Any]]:
    """Run the tests marked `gpu`.

    Raises:
        StageError: there are no tests here, or nothing to run them with.
    """
    if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        raise StageError("tests: pytest or the folder of tests is missing; run it in a checkout, after make setup-dev")
    selected = [TINY_TESTS] if place.tiny else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", *selected, "-q", "--no-header", "-p", "no:cacheprovider"]
    found = _call(command, ROOT, place)
    yield {"ok": found["exit_code"] == 0, "tests": found}


def run_overrides(place: Place, steps: int) -> list[str]:
    """Return the settings of the run, but for its steps: a validation and a checkpoint after so many."""
    settings = [
        "--metrics.log_freq=1" if place.tiny else "--metrics.log_freq=5",
        "--validation.enable",
        f"--validation.freq={steps}",
        "--validation.steps=2",
        "--checkpoint.enable",
        f"--checkpoint.interval={steps}",
    ]
    if place.tiny:
        return [
            *settings,
            *("--training.seq_len=512", "--data.segment_bytes=256", "--data.segment_patches=96", "--data.streams=4"),
            *("--training.local_batch_size=1", "--training.global_batch_size=1", "--patching.max_patch_bytes=64"),
            *("--training.dataloader.num_workers=0", "--metrics.no-enable-tensorboard"),
        ]
    return [
        *settings,
        "--model.flavor=100M",
        *("--training.seq_len=16384", "--data.segment_bytes=4096", "--data.segment_patches=768"),
        *("--training.local_batch_size=4", "--training.global_batch_size=4"),
        *("--training.mixed_precision_param=bfloat16", "--optimizer.lr=4e-4"),
        *("--training.dataloader.num_workers=4", "--compile.enable"),
    ]


def whole_run(place: Place) -> Iterator[dict[str, Any]]:
    """Train on the standard library's sources, validate once, write a checkpoint, and go on from it for a step."""
    data, out = place.folder / "stdlib", place.folder / "run"
    if not data.exists():
        prepare(
            ["python-stdlib"],
            data,
            validation_fraction=0.05,
            seed=0,
            max_bytes=400_000 if place.tiny else 16_000_000,
            record_batch_bytes=(4 if place.tiny else 16) * 1024,
            progress=False,
        )
    steps = 2 if place.tiny else 40
    overrides = [f"--job.dump_folder={out}", f"--training.dataset_path={data}", *run_overrides(place, steps)]
    parts: dict[str, Any] = {}
    for name, last in (("run", steps), ("resume", steps + 1)):
        command = [sys.executable, "-m", "blt_titan", "train", "debug", *overrides, f"--training.steps={last}"]
        parts[name] = _call(command, ROOT, place, OMP_NUM_THREADS="1" if place.tiny else "4")
        file = out / "metrics.jsonl"
        parts[name]["metrics"] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        done = [line for line in parts[name]["metrics"] if line.get("step") == last]
        parts[name]["reached_last_step"] = bool(done)
        yield {"ok": all(p["exit_code"] == 0 and p["reached_last_step"] for p in parts.values()), "runs": parts}


STAGES = {
    "tests": Stage("the tests marked gpu", tests),
    "run": Stage("a run of a few steps: validation, checkpoint, resume", whole_run),
}
