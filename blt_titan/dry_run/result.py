"""What a dry run found, and whether it is sound."""

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from typing import Any

from blt_titan.dry_run.bounds import AllowedSpill
from blt_titan.dry_run.cards import CARDS, GIB, Card
from blt_titan.dry_run.host_reads import HostRead
from blt_titan.dry_run.kernels import Kernel
from blt_titan.dry_run.memory import Memory
from blt_titan.dry_run.roofline import Roofline
from blt_titan.dry_run.sent import Collective


@dataclass(frozen=True)
class GraphResult:
    """A compiled graph."""

    part: str
    backward: bool
    inputs: int
    symbolic: list[str]
    """Inputs that are symbols, or whose sizes are."""
    recompiled: bool
    """It was compiled after the first micro-batch."""
    kernels: list[Kernel]


@dataclass(frozen=True)
class DryRun:
    """What one step of a run does on a card."""

    config: str
    """What the run is called: its TOML and overrides."""
    world_size: int
    gpu: str
    torch: str
    """Version."""
    layout: dict[str, int]
    """Degrees of parallelism that are above 1."""
    parameters: int
    """Number of parameters of the whole model."""
    memory: Memory
    host_reads: list[HostRead]
    graph_breaks: list[str]
    graphs: list[GraphResult]
    """Empty where nothing is compiled."""
    kernels_made: bool
    """Kernels were generated; else `graphs` have none, and there is no roofline."""
    roofline: Roofline | None
    seconds: float
    rank: int | None = None
    """Whose step it is; None for the one in the middle of those that share the first row."""
    device: str = "cuda"
    """"cpu": of a run on CPUs, or an estimate by a CPU's operators."""
    sent: list[Collective] = field(default_factory=list)
    """What it moves over the network."""
    allowed_spills: list[AllowedSpill] = field(default_factory=list)

    @property
    def card(self) -> Card:
        """Return the card that it was made for."""
        return CARDS[self.gpu]

    @property
    def room_bytes(self) -> int:
        """Return what the card has left beside tensors and what is assumed to be there with them."""
        peak = self.memory.peak_bytes
        return self.card.memory_bytes - peak - self.card.beside.bytes_of(peak)

    @property
    def kernels(self) -> list[Kernel]:
        """Return the kernels of all graphs."""
        return [kernel for graph in self.graphs for kernel in graph.kernels]

    def faults(self) -> list[str]:
        """Return a sentence for each thing that would be wrong on the card; none if the step is sound."""
        found = [f"host read: {read.operation} at {read.where}, {read.times} times" for read in self.host_reads]
        found += [f"graph break: {reason}" for reason in self.graph_breaks]
        for graph in self.graphs:
            what = f"{'backward' if graph.backward else 'forward'} of {graph.part}"
            if graph.recompiled:
                found.append(f"recompilation: the {what} is compiled again after the first micro-batch")
            if graph.symbolic:
                found.append(f"symbolic inputs: the {what} has {', '.join(graph.symbolic[:3])}; sizes must be fixed")
        for kernel in self.kernels:
            if kernel.over_shared:
                found.append(
                    f"shared memory: {kernel.name} wants {kernel.shared_bytes:,} bytes a block, "
                    f"{self.gpu} has {self.card.shared_bytes:,}"
                )
            if kernel.spills and self.allowed(kernel) is None:
                found.append(
                    f"spill: {kernel.name} keeps {kernel.stack_bytes} bytes a thread in memory "
                    f"({kernel.registers} registers, {kernel.warps} warps)"
                )
        if self.room_bytes < 0:
            peak = self.memory.peak_bytes
            found.append(
                f"memory: {peak / GIB:.1f} GiB of tensors and {self.card.beside.bytes_of(peak) / GIB:.1f} GiB beside "
                f"them are more than the {self.card.memory_bytes / GIB:.1f} GiB of {self.gpu}"
            )
        return found

    def allowed(self, kernel: Kernel) -> AllowedSpill | None:
        """Return the exception that lets this kernel spill; None if there is none."""
        for spill in self.allowed_spills:
            if fnmatch.fnmatchcase(kernel.name, spill.kernel) and kernel.stack_bytes <= spill.most_bytes:
                return spill
        return None

    def to_json(self) -> dict[str, Any]:
        """Return all that was found, as JSON takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "DryRun":
        """Return what `to_json` gave."""
        graphs = [
            GraphResult(**{**graph, "kernels": [Kernel(**kernel) for kernel in graph["kernels"]]})
            for graph in said["graphs"]
        ]
        roofline = said["roofline"]
        read: dict[str, Any] = {
            "memory": Memory(**said["memory"]),
            "host_reads": [HostRead(**read) for read in said["host_reads"]],
            "graphs": graphs,
            "sent": [Collective(**collective) for collective in said["sent"]],
            "roofline": None if roofline is None else Roofline.from_json(roofline),
            "allowed_spills": [AllowedSpill(**spill) for spill in said["allowed_spills"]],
        }
        return cls(**{**said, **read})
