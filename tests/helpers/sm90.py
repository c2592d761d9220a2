"""Triton kernels compiled for sm_90 by the triton wheel's own tools, without a GPU, as their launchers launch them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPTIONS = ("num_warps", "num_stages")
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int32: "*i32"}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor, and what it does."""

    registers: int
    """How many a thread has."""
    stack_bytes: int
    """Local memory of a thread, where registers are spilled to."""
    shared_bytes: int
    atomics: int
    threads: int
    wide_loads: int
    """Loads of 16 bytes."""


@dataclass
class Recorder:
    """Stands for a kernel in its module: compiles what is launched, and launches nothing."""

    kernel: Any
    compiled: list[Resources] = field(default_factory=list)

    def __getitem__(self, grid):
        assert all(0 < extent < 2**31 for extent in grid)
        return self.launch

    def launch(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constants, aligned = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value = given[name]
            if name in fixed:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], aligned[(i,)] = POINTERS[value.dtype], ALIGNED
            elif isinstance(value, int):
                signature[name] = "i32"
                if value % 16 == 0:
                    aligned[(i,)] = ALIGNED
            else:
                signature[name] = "fp32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned)
        self.compiled.append(resources(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)))


def resources(compiled: Any) -> Resources:
    """Read a compiled kernel's resources."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Resources(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        atomics=len(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED)\b", code)),
        threads=compiled.metadata.num_warps * 32,
        wide_loads=len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", code)),
    )
