"""What connects GPUs: figures of data sheets, and the shares of them that collectives reach.

Nothing here is measured by this project; every plan prints what it assumed.
"""

from dataclasses import dataclass

from blt_titan.dry_run.sent import Collective

RING_KINDS = ("all-gather", "reduce-scatter", "all-reduce")
"""Collectives for which NCCL lays a ring through each adapter, so that each carries its share of the bytes."""


@dataclass(frozen=True)
class Network:
    """Bandwidths of one GPU, in one direction."""

    name: str
    node_gpus: int
    """GPUs of a node."""
    in_node_bytes_per_s: float
    """Between GPUs of a node."""
    between_nodes_bytes_per_s: float
    """By a GPU's part of its node's adapters. Rings use those of all the GPUs that a group has in a node."""
    share: float = 0.75
    """Share of these that large collectives reach."""
    latency_s: float = 2e-5
    """What a collective takes beside its bytes."""

    def seconds(self, collective: Collective) -> float:
        """Return what all calls of a collective take, one after the other."""
        return collective.moved_bytes / (self._rate(collective) * self.share) + collective.calls * self.latency_s

    def is_inside(self, collective: Collective) -> bool:
        """Tell whether the ranks of a collective are all of one node."""
        return collective.stride * collective.ranks <= self.node_gpus

    def _rate(self, collective: Collective) -> float:
        if self.is_inside(collective):
            return self.in_node_bytes_per_s
        if collective.kind not in RING_KINDS:
            return self.between_nodes_bytes_per_s
        rings = max(1, self.node_gpus // collective.stride)
        return min(self.in_node_bytes_per_s, rings * self.between_nodes_bytes_per_s)


NETWORKS = {
    network.name: network
    for network in (
        Network("ib400", node_gpus=8, in_node_bytes_per_s=450e9, between_nodes_bytes_per_s=50e9),
        Network("ib200", node_gpus=8, in_node_bytes_per_s=450e9, between_nodes_bytes_per_s=25e9),
        Network("ib800", node_gpus=8, in_node_bytes_per_s=900e9, between_nodes_bytes_per_s=100e9),
        Network("eth100", node_gpus=8, in_node_bytes_per_s=450e9, between_nodes_bytes_per_s=12.5e9),
        Network("pcie", node_gpus=8, in_node_bytes_per_s=50e9, between_nodes_bytes_per_s=3.125e9),
    )
}
"""By the name that --network takes: NVLink of eight H100 (`ib800`: of eight B200) with a 400, 200, 800 or 100 Gbit/s
adapter for each GPU; GPUs on PCIe 5.0 that share one 200 Gbit/s adapter."""
