"""What a step sends over the network: the bytes of each collective by axis of the mesh; the observer behind a plan.

A rank of n that share a tensor of N bytes moves, in one direction, by the algorithms that NCCL uses for large ones:

    gather, scatter with sum, exchange      N (n - 1) / n
    sum for all                             2 N (n - 1) / n
    send, receive                           N
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from blt_titan.dry_run.memory import called_by_fsdp
from blt_titan.dry_run.watch import NO_ANSWER, Watch, tensors_of

_KINDS = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "all_gather_into_tensor_coalesced": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "send": "send",
    "recv_": "receive",
    "broadcast_": "broadcast",
}
_NAMESPACES = ("c10d.", "_c10d_functional.", "_c10d_functional_autograd.")
_PER_STEP = ("clip", "update")


@dataclass(frozen=True)
class Collective:
    """What a rank moves in one kind of collective over one axis."""

    kind: str
    axis: str
    """Name of the mesh's axis."""
    ranks: int
    """That take part."""
    stride: int
    """Distance of neighbours among the ranks of the job."""
    in_micro_batch: bool
    """It is part of each micro-batch; else of a step."""
    calls: int
    moved_bytes: float
    """In one direction, in a micro-batch or in a step."""


class Sent:
    """Adds up collectives; see `Watch`."""

    watch: Watch
    world_axes: tuple[str, ...] = ()
    """Axes of the layout that are above 1: torch takes the group of all ranks for one that has them all."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._calls: Counter[tuple[str, str, int, int, bool]] = Counter()
        self._bytes: dict[tuple[str, str, int, int, bool], float] = defaultdict(float)

    def before(self, op: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Nothing: collectives run as they are."""
        return NO_ANSWER

    def after(self, op: str, inputs: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Count a collective."""
        if not op.startswith(_NAMESPACES) or (kind := _KINDS.get(op.split(".")[1])) is None:
            return
        group = _group_of(inputs, options)
        if group is None or (n := group.size()) == 1:
            return
        ranks = dist.get_process_group_ranks(group)
        axis = group.group_desc.removeprefix("mesh_")
        if axis in ("default_pg", "undefined", ""):
            axis = self._axis_of_all()
        size = max(map(_bytes, (*inputs, result)), default=0)
        key = (kind, axis, n, ranks[1] - ranks[0], self.watch.phase not in _PER_STEP)
        self._calls[key] += 1
        self._bytes[key] += size * _share(kind, n)

    def _axis_of_all(self) -> str:
        """Return what the group of all ranks is used as: weights are shared over slices of rows too."""
        if called_by_fsdp():
            return "fsdp"
        return self.world_axes[0] if len(self.world_axes) == 1 else "all"

    def result(self, micro_batches: int) -> list[Collective]:
        """Return what was counted since `forget`, most bytes first."""
        found = []
        for key, moved in sorted(self._bytes.items(), key=lambda item: -item[1]):
            times = micro_batches if key[-1] else 1
            found.append(Collective(*key, calls=round(self._calls[key] / times), moved_bytes=moved / times))
        return found


def _share(kind: str, n: int) -> float:
    if kind in ("send", "receive", "broadcast"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n


def _bytes(argument: Any) -> int:
    """Return the bytes of an argument, of which a list of tensors is one: what all share is the largest."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(argument))


def _group_of(inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    for value in (*inputs, *options.values()):
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    resolve: Any = distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
    names = [value for value in (*inputs, *options.values()) if isinstance(value, str)]
    for name in names:
        try:
            return resolve(name)
        except (RuntimeError, KeyError):
            continue  # the name of an operation
    return None
