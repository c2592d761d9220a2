"""What every benchmark writes beside what it prints: its command, its machine and its figures, as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from blt_titan.bench.environment import environment


def write_result(out: Path | None, module: str, arguments: list[str] | None, **figures: Any) -> None:
    """Write a benchmark's figures, if a file is named; `module` is its name below `benchmarks`."""
    if out is None:
        return
    command = " ".join([f"python -m benchmarks.{module}", *(sys.argv[1:] if arguments is None else arguments)])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": command, **environment(), **figures}, indent=2) + "\n")
