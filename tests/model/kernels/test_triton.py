"""The Triton kernels without a GPU: their numbers in the interpreter, their machine code from the wheel's assembler."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch on Linux alone")

import triton

from blt_titan.model.kernels import gather_attention_triton, segment_attention_triton, segment_max_triton
from tests.helpers.sm90 import Recorder

ROOT = Path(__file__).parents[3]

REGISTERS = 168
"""With so many of a thread, 12 warps are resident on a multiprocessor: enough loads under way to fill its bandwidth."""


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.slow
@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4),
    reason="the interpreter of triton 3.6 runs no loop with numpy 2.4; run with numpy 2.3, or triton 3.7",
)
def test_numbers_in_the_interpreter():
    """In a process of its own: triton looks at the variable when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/kernels/in_interpreter.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture
def recorded(monkeypatch):
    """Replace the kernels of a module; return what was compiled as its launchers ran."""

    def replace(module):
        recorders = [Recorder(module._forward), Recorder(module._backward)]
        monkeypatch.setattr(module, "_forward", recorders[0])
        monkeypatch.setattr(module, "_backward", recorders[1])
        return recorders

    return replace


def check(recorders):
    for recorder in recorders:
        (made,) = recorder.compiled
        print(recorder.kernel.__name__, made)
        assert made.stack_bytes == 0, f"registers are spilled: {made}"
        assert made.atomics == 0, f"the order of sums is open: {made}"
        assert made.registers <= REGISTERS, made
        assert made.wide_loads > 0, f"bytes are loaded one by one: {made}"


B, S, P = 2, 24576, 4096


def tensors(H, K, N, dtype):
    """Return a tensor of bytes, one of slots, and offsets, of no content."""
    of_bytes, of_slots = torch.empty(B, S, H, K, dtype=dtype), torch.empty(B, P, N, H, K, dtype=dtype)
    return of_bytes, of_slots, torch.empty(B, P + 1, dtype=torch.int32)


SHAPES = [
    (16, 64, 2, torch.bfloat16),
    (16, 64, 4, torch.bfloat16),
    (10, 128, 2, torch.bfloat16),
    (4, 32, 1, torch.bfloat16),
    (16, 64, 2, torch.float32),
]


@pytest.mark.parametrize(("H", "K", "N", "dtype"), SHAPES)
def test_attention_of_segments_fits_the_registers(recorded, H, K, N, dtype):
    recorders = recorded(segment_attention_triton)
    of_bytes, of_slots, first = tensors(H, K, N, dtype)
    _, lse = segment_attention_triton.forward(of_slots, of_bytes, of_bytes, first)
    segment_attention_triton.backward(of_slots, of_slots, of_bytes, of_bytes, first, lse)
    check(recorders)


@pytest.mark.parametrize(("H", "K", "N", "dtype"), SHAPES)
def test_attention_by_index_fits_the_registers(recorded, H, K, N, dtype):
    recorders = recorded(gather_attention_triton)
    of_bytes, of_slots, first = tensors(H, K, N, dtype)
    source = torch.empty(B, S, dtype=torch.int32)
    _, weight = gather_attention_triton.forward(of_bytes, of_slots, of_slots, source)
    gather_attention_triton.backward(of_bytes, of_bytes, of_slots, of_slots, first, weight)
    check(recorders)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_maximum_fits_the_registers(recorded, dtype):
    recorders = recorded(segment_max_triton)
    x, first = torch.empty(B, S, 1024, dtype=dtype), torch.empty(B, P + 1, dtype=torch.int32)
    out = segment_max_triton.forward(x, first)
    segment_max_triton.backward(out, x, first, out)
    check(recorders)
