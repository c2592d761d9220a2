"""A dry run as lines to read."""

from collections.abc import Iterator

from blt_titan.dry_run.cards import GIB
from blt_titan.dry_run.kernels import Kernel
from blt_titan.dry_run.result import DryRun

_MOST_KERNELS = 12
_LEAST_SHOWN_BYTES = GIB // 200


def report(found: DryRun) -> str:
    """Return the report that `blt-titan check-cuda` prints."""
    layout = ", ".join(f"{name} {degree}" for name, degree in found.layout.items())
    head = (
        f"{found.config} on {found.world_size} x {found.gpu}{f' ({layout})' if layout else ''}: "
        f"{found.parameters / 1e9:.2f}B parameters, torch {found.torch}, a dry run of {found.seconds:.0f} s"
    )
    return "\n".join(
        [head, "", *_memory(found), "", *_graphs(found), *_kernels(found), *_roofline(found), *_end(found)]
    )


def _memory(found: DryRun) -> Iterator[str]:
    memory, card = found.memory, found.card
    peak, beside = memory.peak_bytes, card.beside
    yield f"memory per GPU: {_gib(peak)} of tensors at the peak, in {memory.peak_phase}"
    for kind, size in memory.at_peak.items():
        if size >= _LEAST_SHOWN_BYTES:
            yield f"  {_gib(size):>10}  {kind}"
    yield "  peak by phase: " + ", ".join(f"{phase} {_gib(size)}" for phase, size in memory.by_phase.items())
    kept = sum(size for kind, size in memory.after_forward.items() if kind.startswith("activations"))
    between = sum(memory.between_steps.values())
    yield f"  kept by a forward for its backward: {_gib(kept)}; between steps: {_gib(between)}"
    yield (
        f"  not tensors (assumed): CUDA context {_gib(beside.context_bytes)}, NCCL {_gib(beside.nccl_bytes)}, "
        f"workspaces {_gib(beside.workspace_bytes)}, fragmentation {beside.fragmentation_share:.0%} of the peak"
    )
    room = found.room_bytes
    left = f"{_gib(room)} left" if room >= 0 else f"{_gib(-room)} too much"
    yield f"  of {_gib(card.memory_bytes)} on {card.name}: {left}"


def _graphs(found: DryRun) -> Iterator[str]:
    yield f"host reads in a step: {len(found.host_reads) or 'none'}"
    if not found.graphs:
        yield "compiled graphs: none"
        return
    again = sum(graph.recompiled for graph in found.graphs)
    symbolic = sum(bool(graph.symbolic) for graph in found.graphs)
    yield (
        f"compiled graphs: {len(found.graphs)}; graph breaks {len(found.graph_breaks) or 'none'}, recompilations "
        f"{again or 'none'}, with symbolic inputs {symbolic or 'none'}"
    )


def _kernels(found: DryRun) -> Iterator[str]:
    if not found.kernels_made:
        yield "kernels: not generated (--memory-only)"
        return
    kernels = found.kernels
    spilling = [kernel for kernel in kernels if kernel.spills]
    yield f"kernels: {len(kernels)}, of which {len(spilling) or 'none'} keep registers in memory"
    # Templates are the large ones: attention above all.
    shown = spilling + [kernel for kernel in kernels if "_tem_" in kernel.name and kernel not in spilling]
    for kernel in shown[:_MOST_KERNELS]:
        allowed = found.allowed(kernel) if kernel.spills else None
        yield f"  {_kernel(kernel)}{f'; allowed: {allowed.reason}' if allowed else ''}"


def _kernel(kernel: Kernel) -> str:
    spills = f"spills {kernel.stack_bytes} B a thread" if kernel.spills else "no spill"
    return (
        f"{kernel.name}: {kernel.registers} registers, {spills}, {kernel.shared_bytes / 1024:.0f} KiB shared, "
        f"{kernel.warps} warps"
    )


def _roofline(found: DryRun) -> Iterator[str]:
    if found.roofline is None:
        return
    yield ""
    yield from found.roofline.lines()


def _end(found: DryRun) -> Iterator[str]:
    yield ""
    faults = found.faults()
    yield from faults
    yield "sound" if not faults else f"not sound: {len(faults)} fault{'s' if len(faults) > 1 else ''}"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / GIB:.2f} GiB"
