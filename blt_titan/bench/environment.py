"""Where figures were taken: the machine, the versions of what ran, and the commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton", "torchao", "torchtitan", "numpy")


def environment() -> dict[str, Any]:
    """Return `machine`, `versions` and `commit`, as every file of figures has them."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def machine() -> dict[str, Any]:
    """Describe the processor, the memory and the GPU, if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of this package and of what may take part; None for what is not installed."""
    return {"python": platform.python_version(), "blt_titan": _version("blt_titan")} | {
        name: torch.__version__ if name == "torch" else _version(name) for name in PACKAGES
    }


def commit() -> str:
    """Return the commit of this checkout, with a mark if files differ from it, or that there is no checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + (" and changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def _git(*words: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
