"""Bytes of live tensors through a step: the peak, when it is, and what lives then.

A storage counts from the operation that makes it until nothing refers to it, rounded up to the allocator's blocks.
Parameters that FSDP gathers keep their storage and change its size, so that is followed too. In a compiled graph the
operations are counted one by one, unfused: what lives between graphs is exact, what a graph holds for itself is an
upper bound.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_param_group

from blt_titan.dry_run.watch import NO_ANSWER, Watch, plain, tensors_of

ALLOCATOR_BLOCK = 512
PARAMETERS, GRADIENTS, OPTIMIZER, BATCH = "parameters", "gradients", "optimizer state", "batch"
GATHERED, EXCHANGE = "gathered parameters", "buffers of collectives"
LOGITS, BACKWARD, TEMPORARY = "logits and loss", "backward's own", "clipping and update"
_COLLECTIVES = ("_c10d_functional", "c10d", "fsdp.", "_dtensor")


@dataclass(frozen=True)
class Memory:
    """Bytes of live tensors of the last of the steps that were run."""

    peak_bytes: int
    peak_phase: str
    by_phase: dict[str, int]
    """Peak of each phase."""
    at_peak: dict[str, int]
    """By kind of tensor, largest first."""
    after_forward: dict[str, int]
    """By kind, when the last micro-batch's forward has ended: what is kept for backward."""
    between_steps: dict[str, int]
    """By kind, when nothing runs."""


class LiveBytes:
    """Follows storages; see `Watch`.

    Args:
        vocab_size: width by which logits are known.
        device: type of the device whose tensors count.
    """

    watch: Watch

    def __init__(self, vocab_size: int, device: str = "cuda"):
        self.vocab_size = vocab_size
        self.device = device
        self.live = 0
        self.by_kind: Counter[str] = Counter()
        self._of_storage: dict[int, tuple[int, str]] = {}
        self.forget_peaks()
        self.after_forward: dict[str, int] = {}

    def forget_peaks(self) -> None:
        """Begin anew: the first step makes what later ones find."""
        self.peak, self.peak_phase, self.at_peak = 0, "", {}
        self.by_phase: dict[str, int] = {}

    def before(self, op: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Nothing: only results live."""
        return NO_ANSWER

    def after(self, op: str, inputs: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Count the storages of the results."""
        phase = self.watch.phase
        self.by_phase[phase] = max(self.by_phase.get(phase, 0), self.live)
        for tensor in tensors_of(result):
            if tensor.device.type == self.device:
                self.count(tensor, None, op)

    def count(self, tensor: torch.Tensor, kind: str | None, op: str = "") -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = plain(tensor).untyped_storage()
        key = storage._cdata
        if key in self._of_storage:
            return
        kind = kind or self._kind(tensor, op)
        self._of_storage[key] = (0, kind)
        self._resize(key, storage.nbytes())
        weakref.finalize(storage, self._gone, key)

    def name(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say what kind of tensors these have become."""
        for tensor in map(plain, tensors):
            key = tensor.untyped_storage()._cdata
            if key in self._of_storage:
                size, before = self._of_storage[key]
                self._of_storage[key] = (size, kind)
                self.by_kind[before] -= size
                self.by_kind[kind] += size
            elif tensor.device.type == self.device:
                self.count(tensor, kind)

    def result(self, between_steps: dict[str, int]) -> Memory:
        """Return what was seen since `forget_peaks`."""
        return Memory(
            self.peak, self.peak_phase, self.by_phase, _largest(self.at_peak), self.after_forward, between_steps
        )

    def now(self) -> dict[str, int]:
        """Return what lives, by kind."""
        return _largest(self.by_kind)

    def follow_fsdp(self) -> None:
        """Follow parameters whose storage FSDP fills and empties."""
        allocate, free = fsdp_param.alloc_storage, fsdp_param.free_storage

        def allocate_counted(tensor: torch.Tensor) -> None:
            allocate(tensor)
            self.count(tensor, GATHERED)
            storage = plain(tensor).untyped_storage()
            self._resize(storage._cdata, storage.nbytes())

        def free_counted(tensor: torch.Tensor) -> None:
            free(tensor)
            key = plain(tensor).untyped_storage()._cdata
            if key in self._of_storage:
                self._resize(key, 0)

        for module in (fsdp_param, fsdp_param_group):
            if hasattr(module, "alloc_storage"):
                module.alloc_storage = allocate_counted  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(module, "free_storage"):
                module.free_storage = free_counted  # pyright: ignore[reportAttributeAccessIssue]

    def _resize(self, key: int, n_bytes: int) -> None:
        before, kind = self._of_storage[key]
        size = -(-n_bytes // ALLOCATOR_BLOCK) * ALLOCATOR_BLOCK
        self._of_storage[key] = (size, kind)
        self.live += size - before
        self.by_kind[kind] += size - before
        phase = self.watch.phase
        self.by_phase[phase] = max(self.by_phase.get(phase, 0), self.live)
        if self.live > self.peak:
            self.peak, self.peak_phase, self.at_peak = self.live, phase, dict(self.by_kind)

    def _gone(self, key: int) -> None:
        size, kind = self._of_storage.pop(key)
        self.live -= size
        self.by_kind[kind] -= size

    def _kind(self, tensor: torch.Tensor, op: str) -> str:
        watch = self.watch
        if op.startswith(_COLLECTIVES) or (op.startswith(("aten.empty", "aten.new_empty")) and called_by_fsdp()):
            return EXCHANGE
        if tensor.ndim and tensor.shape[-1] == self.vocab_size and tensor.ndim > 1 and watch.phase != "update":
            return LOGITS
        if watch.phase == "forward" or (watch.phase == "backward" and watch.part != "elsewhere"):
            return f"activations: {watch.part}"
        return {"backward": BACKWARD, "loss": LOGITS, "batch": BATCH}.get(watch.phase, TEMPORARY)


def _largest(by_kind: dict[str, int]) -> dict[str, int]:
    return dict(sorted(((kind, size) for kind, size in by_kind.items() if size > 0), key=lambda item: -item[1]))


def called_by_fsdp() -> bool:
    """Tell whether it is FSDP's collectives, or their buffers, by which this is called."""
    frame: Any = sys._getframe(1)
    for _ in range(14):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith("_fsdp_collectives.py"):
            return True
        frame = frame.f_back
    return False
