"""What every benchmark writes beside what it prints: its command, its machine and its figures, as JSON."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def machine() -> dict[str, Any]:
    """Describe where the figures were taken."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def write_result(out: Path | None, module: str, arguments: list[str] | None, **figures: Any) -> None:
    """Write a benchmark's figures, if a file is named; `module` is its name below `benchmarks`."""
    if out is None:
        return
    command = " ".join([f"python -m benchmarks.{module}", *(sys.argv[1:] if arguments is None else arguments)])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": command, "machine": machine(), **figures}, indent=2) + "\n")
