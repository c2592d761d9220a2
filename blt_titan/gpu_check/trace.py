"""Stage of the profile: a trace of a few steps, reduced to a table.

What a reader of a trace looks for first: which class of kernels takes the time, how long the device has nothing to do
and between which kernels, and where the host waits for it. Works on spans, so that a test needs no device.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from blt_titan.bench.table import Table
from blt_titan.gpu_check.stage import Place, Stage, attempt, ok, wait
from blt_titan.gpu_check.step import StepPlan, build_step, rank_alone
from blt_titan.gpu_check.training import plans_1b

CLASSES = (
    # Names of fused kernels list what is fused, and those of flash kernels hold "cutlass": so these come first.
    ("fused (compiled)", r"^triton_(?!tem_)|cpp_fused"),
    ("communication", r"nccl|gloo|all_gather|reduce_scatter|all_to_all|allreduce"),
    ("attention", r"flex|flash|fmha|attention|attn|varlen|triton_tem_(?!.*_(mm|addmm|bmm))"),
    ("matmul", r"triton_tem_|gemm|cutlass|nvjet|cublas|xmma|scaled_mm|aten::(mm|addmm|bmm|matmul|linear|_scaled_mm)$"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("copies", r"memcpy|memset|copy_|aten::(copy|fill|zero)"),
    ("index and sort", r"index|gather|scatter|embedding|sort|segment|searchsorted|blt::"),
    ("reductions and norms", r"reduce|norm|softmax|sum|cat"),
    ("elementwise", r"elementwise|vectorized|aten::"),
)
"""Class of a kernel: what its name holds; the first that fits."""
WAITS = re.compile(r"Synchronize|_local_scalar_dense|aten::item|cudaMemcpy(?!.*Async)")
"""Calls in which the host waits for the device."""
GAPS_SHOWN = 10
VARIANTS = ("compiled", "eager")
STEPS = 2


@dataclass(frozen=True)
class Span:
    """Something that took time, in microseconds from any beginning."""

    name: str
    begin_us: float
    end_us: float

    @property
    def length_us(self) -> float:
        """How long it took."""
        return self.end_us - self.begin_us


def class_of(name: str) -> str:
    """Return the class of a kernel.

    >>> class_of("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT"), class_of("triton_tem_fused_flex_attention_0")
    ('matmul', 'attention')
    """
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def reduce_trace(kernels: Sequence[Span], calls: Sequence[Span]) -> dict[str, Any]:
    """Reduce a trace.

    Args:
        kernels: what the device did; streams may overlap.
        calls: what the host did.

    Returns:
        `span_ms` from the first kernel to the end of the last, `busy_ms` of it, `idle_ms`, `by_class` (milliseconds,
        share of all kernels' time, count), `largest_kernels`, `gaps` (the longest idle times and what is on both sides)
        and `host_waits` (calls that wait, with their number and time).
    """
    kernels = sorted(kernels, key=lambda span: span.begin_us)
    if not kernels:
        raise ValueError("the trace has no kernel of the device")
    by_class: dict[str, list[float]] = defaultdict(list)
    by_name: Counter[str] = Counter()
    for span in kernels:
        by_class[class_of(span.name)].append(span.length_us)
        by_name[span.name] += span.length_us  # pyright: ignore[reportArgumentType]
    total_us = sum(span.length_us for span in kernels)
    gaps = sorted(_gaps(kernels), key=lambda gap: -gap["us"])
    idle_us = sum(gap["us"] for gap in gaps)
    span_us = max(span.end_us for span in kernels) - kernels[0].begin_us
    waits: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        if WAITS.search(call.name):
            waits[call.name].append(call.length_us)
    return {
        "span_ms": span_us / 1e3,
        "busy_ms": (span_us - idle_us) / 1e3,
        "idle_ms": idle_us / 1e3,
        "idle_share": idle_us / span_us if span_us else 0.0,
        "by_class": {
            kind: {"ms": sum(us) / 1e3, "share": sum(us) / total_us, "kernels": len(us)}
            for kind, us in sorted(by_class.items(), key=lambda item: -sum(item[1]))
        },
        "largest_kernels": [{"name": name[:120], "ms": us / 1e3} for name, us in by_name.most_common(25)],
        "gaps": gaps[:GAPS_SHOWN],
        "host_waits": {name: {"count": len(us), "ms": sum(us) / 1e3} for name, us in waits.items()},
    }


def _gaps(kernels: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """Yield the times in which nothing runs; kernels are in the order of their beginnings."""
    last = kernels[0]
    for span in kernels[1:]:
        if span.begin_us > last.end_us:
            gap_us = span.begin_us - last.end_us
            yield {"us": gap_us, "after": last.name[:120], "before": span.name[:120]}
        if span.end_us > last.end_us:
            last = span


def trace_table(found: dict[str, Any]) -> Table:
    """Show a reduced trace."""
    rows = [
        [kind, f"{part['ms']:.2f}", f"{part['share']:.1%}", f"{part['kernels']:,}"]
        for kind, part in found["by_class"].items()
    ]
    rows.append(["idle", f"{found['idle_ms']:.2f}", f"{found['idle_share']:.1%} of the span", ""])
    rows += [[f"wait: {n}", f"{w['ms']:.2f}", "", str(w["count"])] for n, w in found["host_waits"].items()]
    return Table(f"{found['span_ms']:.1f} ms", ["class", "ms", "share", "kernels"], rows)


def profile_step(plan: StepPlan, place: Place) -> dict[str, Any]:
    """Trace a few steps, and reduce the trace."""
    step = build_step(plan, place)
    for _ in range(1 if place.tiny else 3):
        step.run()
    wait(place)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.is_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step.run()
        wait(place)
    events: Any = profiler.events() or []
    calls = [e for e in events if e.device_type.name == "CPU"]
    if place.is_cuda:
        kernels = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
    else:
        # A CPU has no kernels to trace: operators that no other operator called stand for them.
        kernels = [e for e in calls if _is_operator(e) and not _is_operator(e.cpu_parent)]
    found = reduce_trace([_span(e) for e in kernels], [_span(e) for e in calls])
    return {"steps": STEPS, **found, "table": trace_table(found).text()}


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def _span(event: Any) -> Span:
    return Span(event.name, event.time_range.start, event.time_range.end)


def run(place: Place) -> Iterator[dict[str, Any]]:
    """Trace steps of the 1B's shape."""
    parts: dict[str, dict[str, Any]] = {}
    plans = plans_1b(place)
    with rank_alone(place):
        for name in VARIANTS:
            parts[name] = attempt(lambda name=name: profile_step(plans[name], place), place)
            yield {"ok": ok(parts), "traces": parts}


STAGES = {"profile": Stage("a trace of steps of the 1B's shape: time by class, gaps, waits of the host", run)}
