"""Where the host asks the device for a number: each stops the host until all kernels before it have run.

An operation counts if its result, or its shape, is only known from data: `.item()`, `if tensor:`, `nonzero`, a boolean
index, `unique`; a copy to the host; and a copy to the device that is waited for. It is noted with the line of this
project from which it came, and answered with a one, so that a step goes on and all are found.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from blt_titan.dry_run.watch import NO_ANSWER, Watch, tensors_of

_ROOMS = ("blt_titan", "parallelisms")
_READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "bincount",
    "is_nonzero",
    "repeat_interleave.Tensor",
)


@dataclass(frozen=True)
class HostRead:
    """A place where the host waits for the device."""

    operation: str
    where: str
    """File and line of this project, and the phase of the step."""
    times: int = 1


class HostReads:
    """Notes host reads; see `Watch`."""

    watch: Watch

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Begin anew: a first step may read what is made once."""
        self._found: Counter[tuple[str, str]] = Counter()

    def found(self) -> list[HostRead]:
        """Return what was found, most frequent first."""
        return [HostRead(op, where, times) for (op, where), times in self._found.most_common()]

    def before(self, op: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Note what reads, and answer in place of `.item()`."""
        name = op.removeprefix("aten.")
        if "output_size" in options:
            return NO_ANSWER
        if name.startswith(_READS):
            if any(tensor.device.type == "cuda" for tensor in tensors_of(args)):
                self._note(name)
            if name.startswith("_local_scalar_dense") and isinstance(args[0], FakeTensor):
                return _one(args[0].dtype)
        elif name.startswith(("_to_copy", "copy_")):
            self._copy(name, args, options)
        return NO_ANSWER

    def after(self, op: str, inputs: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Nothing: reads are seen before they happen."""

    def _copy(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        tensors = tensors_of(args)
        if name.startswith("copy_"):
            if len(tensors) < 2:
                return
            target, source = tensors[0].device, tensors[1].device
            waits = not (options.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            source, target = tensors[0].device, torch.device(options.get("device") or tensors[0].device)
            waits = not options.get("non_blocking")
        if source.type != target.type and "cuda" in (source.type, target.type) and waits:
            self._note(f"copy {source.type} to {target.type}")

    def _note(self, name: str) -> None:
        if self.watch.phase != "setup":
            self._found[name, f"{_line_of_ours()} ({self.watch.phase})"] += 1


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _line_of_ours() -> str:
    """Return the innermost line of this project, outside of the dry run itself; else of whoever called torch."""
    frame, caller = sys._getframe(1), ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inside = [room for room in _ROOMS if room in path.parts]
        if inside and "dry_run" not in path.parts:
            return f"{'/'.join(path.parts[path.parts.index(inside[0]) :])}:{frame.f_lineno}"
        if not caller and not inside and "torch" not in path.parts:
            caller = f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return caller or "?"
