"""Tensors on "cuda" without data in this process, with any build of torch and no card: forward only.

A CPU build of torch has no guard for CUDA devices; one that does nothing is compiled, in a few seconds, and registered.
"""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""


@contextmanager
def fake_cuda(folder: Path) -> Iterator[FakeTensorMode]:
    """A mode in which tensors have no data; `folder` is for what is compiled, once in a process."""
    if not _registered:
        _register_guard(folder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


_registered: list[str] = []


def _register_guard(folder: Path) -> None:
    _registered.append("CUDA")
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    source, library = folder / "guard.cpp", folder / "libguard.so"
    source.write_text(GUARD)
    root = Path(torch.__file__).parent
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", "-o", library, source, f"-L{root}/lib", "-lc10"],
        check=True,
    )
    ctypes.CDLL(str(library))
