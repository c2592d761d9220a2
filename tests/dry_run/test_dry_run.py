"""Whole dry runs, which need a CUDA build of torch and no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blt_titan.dry_run.cards import GIB
from blt_titan.dry_run.result import DryRun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch, as .venv-cuda-2.13.0 has"),
]
ROOT = Path(__file__).parents[2]
READING = """
from blt_titan.model.blt import BLT
forward = BLT.forward
def reading(self, ids_BS, layout):
    assert ids_BS.sum().item() is not None
    return forward(self, ids_BS, layout)
BLT.forward = reading
"""


def check_cuda(*arguments: str, beside: Path | None = None) -> tuple[int, dict, str]:
    command = [sys.executable, "-m", "blt_titan", "check-cuda", "--json", "--memory-only", *arguments]
    path = os.pathsep.join([str(ROOT), *([str(beside)] if beside else [])])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


@pytest.mark.parametrize(
    "layout",
    [
        ("--world-size", "1"),
        ("--world-size", "4", "--parallelism.context_parallel_degree=2"),
        ("--world-size", "4", "--parallelism.tensor_parallel_degree=2", "--compile.enable"),
        (
            *("--world-size", "2", "--model.attention_backend=varlen", "--training.mixed_precision_param=bfloat16"),
            "--compile.enable",
        ),
        (
            "--world-size",
            "4",
            "--parallelism.pipeline_parallel_degree=2",
            "--training.local_batch_size=4",
            "--rank",
            "2",
        ),
        ("--world-size", "4", "--parallelism.data_parallel_replicate_degree=2", "--training.global_batch_size=8"),
    ],
    ids=["one", "cp2", "tp2 compiled", "varlen compiled", "pp2", "replicas"],
)
def test_the_debug_model_is_sound(layout):
    code, said, errors = check_cuda("--config", "debug", *layout)
    assert said, errors
    assert (said["faults"], code) == ([], 0)
    said.pop("faults")
    found = DryRun.from_json(said)
    assert found.graphs, "FlexAttention is compiled, whether or not blocks are"
    # AdamW keeps two moments of every parameter in fp32; padding of the allocator is little.
    kept = found.memory.between_steps
    assert kept["optimizer state"] == pytest.approx(2 * kept["parameters"], rel=0.05)
    assert 0 < found.memory.peak_bytes < GIB


def test_a_host_read_in_the_model_is_found(tmp_path):
    (tmp_path / "reading_model.py").write_text(READING)
    code, said, errors = check_cuda(
        "--config", "debug", "--world-size", "2", "--experimental.custom_import=reading_model", beside=tmp_path
    )
    assert code == 1, errors
    assert [read["operation"] for read in said["host_reads"]] == ["_local_scalar_dense.default"]
    assert said["host_reads"][0]["where"] == "reading_model.py:5 (forward)"


def test_a_card_that_is_too_small_is_a_fault():
    code, said, errors = check_cuda("--config", "blt_8b", "--world-size", "1", "--training.local_batch_size=1")
    assert code == 1, errors
    assert said["faults"][0].startswith("memory: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--training.enable_cpu_offload"], "enable_cpu_offload"),
        (["--rank", "2"], "--rank 2"),
        (["--training.seq_len=100"], "training.seq_len = 100"),
    ],
)
def test_what_cannot_be_run_is_a_sentence(arguments, sentence):
    code, said, errors = check_cuda("--config", "debug", "--world-size", "2", *arguments)
    assert (code, said) == (2, {})
    assert sentence in errors
