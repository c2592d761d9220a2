"""What a stage of the check is, and how one is run: its figures are written as they come."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blt_titan.bench.environment import environment

OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError)


class StageError(ValueError):
    """A stage cannot be run as it was asked; says why."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs, and how large."""

    device: str
    """cuda or cpu."""
    tiny: bool
    """Models and rows of a test."""
    folder: Path
    """For what a stage writes beside its figures."""
    predictions: Path | None = None
    """A folder of files of `blt-titan check-cuda --json`."""

    @property
    def is_cuda(self) -> bool:
        """Tell whether figures are those of a GPU."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Stage:
    """A part of the check."""

    summary: str
    run: Callable[[Place], Iterator[dict[str, Any]]]
    """Yields after each part what was found so far, with `ok`."""


def run_stage(name: str, stage: Stage, place: Place, out: Path, command: str) -> dict[str, Any]:
    """Run a stage, and write its file after each part of it.

    Args:
        name: of the stage.
        stage: the stage.
        place: where it runs.
        out: the file.
        command: what was asked, for the record.

    Returns:
        What the file says: where and when it was taken, `finished`, `ok` and the figures.
    """
    began = time.perf_counter()
    head = {"stage": name, "command": command, **environment(), "device": place.device, "tiny": place.tiny}
    result: dict[str, Any] = head | {"finished": False, "ok": False}
    write(out, result)
    for found in stage.run(place):
        result = head | {"finished": False, "seconds": time.perf_counter() - began, **found}
        write(out, result)
    result |= {"finished": True}
    write(out, result)
    return result


def write(out: Path, result: dict[str, Any]) -> None:
    """Write a result whole: a machine that goes away leaves the one before."""
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(out)


def attempt(work: Callable[[], dict[str, Any]], place: Place) -> dict[str, Any]:
    """Do a part of a stage, and free what it had; a failure is figures too, because the time on a GPU is short.

    Returns:
        What `work` returned, or `failed` with the reason.
    """
    try:
        return work()
    except (RuntimeError, ValueError, ImportError, *OUT_OF_MEMORY) as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if place.is_cuda:
            torch.cuda.empty_cache()


def wait(place: Place) -> None:
    """Wait for the device."""
    if place.is_cuda:
        torch.cuda.synchronize()


def ok(parts: dict[str, dict[str, Any]]) -> bool:
    """Tell whether no part failed."""
    return not any("failed" in part for part in parts.values())
