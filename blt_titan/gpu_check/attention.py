"""Stage of attention: the backends against each other, at the shapes of the 1B's local and global stacks.

Each backend gives the same as SDPA on a short row before it is timed on a long one.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch

from blt_titan.gpu_check.stage import Place, Stage, attempt, ok, wait
from blt_titan.model.attention import AttentionBackend, attend, causal_mask, window_mask

BACKENDS = ("flex", "varlen")
ON_CPU = ("sdpa",)
"""FlexAttention has no backward on a CPU."""
TOLERANCE = 2e-2
"""Error, in norms of outputs and gradients in bf16: a rounding of 2**-9 for each of several steps."""


@dataclass(frozen=True)
class Shape:
    """Attention over one row."""

    slots: int
    heads: int
    head_dim: int
    window: int | None
    """None for causal attention over all."""
    documents: int = 1


SHAPES = {
    "local": Shape(24_576, 16, 64, 512),
    "local_8_documents": Shape(24_576, 16, 64, 512, documents=8),
    "global": Shape(6_144, 16, 128, None),
    "global_8_documents": Shape(6_144, 16, 128, None, documents=8),
}
TINY_SHAPES = {"local": Shape(96, 2, 16, 16, documents=2), "global": Shape(64, 2, 16, None, documents=2)}
CHECKED_SLOTS = 1_024


def _documents(shape: Shape, slots: int, device: str) -> torch.Tensor:
    """Return the document of each slot of one row: of unequal lengths, as in data."""
    weights = torch.arange(1, shape.documents + 1, dtype=torch.float64)
    ends = (weights.cumsum(0) / weights.sum() * slots).round().long()
    return torch.searchsorted(ends, torch.arange(slots), right=True)[None].int().to(device)


def _work(shape: Shape, slots: int, backend: Any, place: Place) -> Callable[[], list[torch.Tensor]]:
    """Return a forward and a backward; it returns the output and the gradients."""
    doc_BS = _documents(shape, slots, place.device)
    if shape.window is None:
        mask = causal_mask(doc_BS, backend=backend)
    else:
        mask = window_mask(doc_BS, window=shape.window, backend=backend)
    draw = torch.Generator().manual_seed(0)
    size = (1, slots, shape.heads, shape.head_dim)
    q, k, v, g = (torch.randn(size, generator=draw).to(place.device, torch.bfloat16) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def work() -> list[torch.Tensor]:
        out = attend(q, k, v, mask)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), g)]

    return work


def measure(shape: Shape, backend: str, place: Place) -> dict[str, Any]:
    """Compare one backend with SDPA on a short row, and time it on the row of `shape`.

    Raises:
        RuntimeError: it computes something else.
    """
    checked = min(shape.slots, CHECKED_SLOTS)
    wanted, got = (_work(shape, checked, which, place)() for which in ("sdpa", backend))
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, wanted, strict=True)]
    if not max(errors) <= TOLERANCE:
        raise RuntimeError(f"{backend} differs from sdpa: output, dq, dk, dv by {errors} of their norms")
    work = _work(shape, shape.slots, backend, place)
    seconds = []
    for i in range(3 if place.tiny else 15):
        wait(place)
        began = time.perf_counter()
        work()
        wait(place)
        if i >= (1 if place.tiny else 5):
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "median_s": statistics.median(seconds), "errors": errors}


def run(place: Place) -> Iterator[dict[str, Any]]:
    """Measure all backends at all shapes."""
    parts: dict[str, dict[str, Any]] = {}
    known = get_args(AttentionBackend)
    for name, shape in (TINY_SHAPES if place.tiny else SHAPES).items():
        for backend in BACKENDS if place.is_cuda else ON_CPU:
            if backend not in known:
                reason = f"this code knows no attention_backend {backend!r}, only {', '.join(known)}"
                parts[f"{name}_{backend}"] = {"skipped": reason}
                continue
            parts[f"{name}_{backend}"] = attempt(lambda b=backend, s=shape: measure(s, b, place), place)
            yield {"ok": ok(parts), "attention": parts}
    yield {"ok": ok(parts), "attention": parts}


STAGES = {"attention": Stage("FlexAttention against varlen, local and global, forward and backward", run)}
