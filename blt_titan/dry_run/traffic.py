"""Counts the FLOPs and bytes of a step's kernels, and what they take on a card: the observer behind a `Roofline`.

An operation outside of compiled graphs is one kernel that reads its inputs and writes its results; views cost nothing.
Of a compiled graph the matrix multiplications and attention are counted from its operations, the fused kernels by
Inductor's own count of bytes.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from blt_titan.dry_run.cards import Card
from blt_titan.dry_run.compiler import Graph
from blt_titan.dry_run.roofline import Roofline, Work, assumptions_of
from blt_titan.dry_run.watch import NO_ANSWER, Watch, tensors_of

TILE = 128
"""Rows and columns of a tile that attention visits or leaves out."""
_VIEWS = re.compile(
    r"_?(unsafe_)?(view|reshape|transpose|t\.|permute|expand|unsqueeze|squeeze|select|slice|split|unbind|detach|as_strided)"
    r"|alias|chunk|unflatten|flatten|diagonal|unfold|empty|new_empty|lift|sym_|resize|set_|is_|_version|record_stream"
    r"|_to_local|wait_tensor"
)
"""Operations that move no bytes, at the beginning of their names."""
_COLLECTIVES = ("_c10d_functional.", "c10d.")
_IN_PLACE = ("aten._fused_adam", "aten._foreach")
"""Operations on lists of tensors, which return nothing."""
_MATMULS = ("mm.", "addmm.", "bmm.", "_scaled_mm.")
_UPDATE_PHASES = ("clip", "update")
_BACKWARD_WORK = 3.5
"""Matrix multiplications of attention's forward and backward: 2, and 5 with two computed again."""
_SORT_PASSES = 8
"""How often the sort behind an embedding's gradient reads and writes an index of 16 bytes with its place."""


@dataclass(frozen=True)
class Attention:
    """How much of attention's scores a stack computes."""

    window: int | None
    """Keys that a query sees; None for all before it."""

    def keys(self, n_keys: int) -> float:
        """Return how many keys the tiles of a query have on average."""
        if self.window is None:
            return (n_keys + TILE) / 2
        return min(self.window + TILE, n_keys)

    def share(self, card: Card, backward: bool) -> float:
        """Return the share of the card's dense figure that it reaches."""
        return (card.causal_attention_share if self.window is None else card.window_attention_share)[backward]


class Traffic:
    """Adds up work; see `Watch`.

    Args:
        card: what is estimated for.
        attention: by part of the model.
    """

    watch: Watch

    def __init__(self, card: Card, attention: dict[str, Attention]):
        self.card = card
        self.attention = attention
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._kernels: Counter[tuple[bool, str]] = Counter()
        self._seconds: dict[tuple[bool, str], float] = defaultdict(float)
        self._flops: dict[tuple[bool, str], float] = defaultdict(float)
        self._bytes: dict[tuple[bool, str], float] = defaultdict(float)
        self._sent: Counter[str] = Counter()

    def before(self, op: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Nothing: results are needed to count."""
        return NO_ANSWER

    def after(self, op: str, inputs: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Count an operation outside of compiled graphs."""
        results = tensors_of(result)
        if self.watch.in_graph or not (results or op.startswith(_IN_PLACE)):
            return
        if results and results[0].device.type != "cuda":
            return
        if op.startswith(_COLLECTIVES):
            if not op.startswith("_c10d_functional.wait_tensor") and self.watch.phase not in _UPDATE_PHASES:
                self._sent[op.split(".")[1]] += sum(map(_bytes, results))
            return
        name = op.removeprefix("aten.")
        if _VIEWS.match(name):
            return
        read = tensors_of((inputs, options))
        part = f"{self.watch.part}{' (backward)' if self.watch.phase == 'backward' else ''}"
        if name.startswith(_MATMULS):
            matrices = [tensor for tensor in read if tensor.ndim >= 2][-2:] if name.startswith("addmm") else read[:2]
            rate = self._matmul_rate(name.startswith("_scaled_mm"))
            self._add(f"{part}: matmuls", _matmul_flops(*matrices), sum(map(_bytes, [*matrices, *results])), rate)
            return
        kind, moved, launches = _moved(name, read, results)
        self._add(f"{part}: {kind}", 0, moved, math.inf, launches)

    def ran(self, graph: Graph) -> None:
        """Count a compiled graph that runs."""
        part = f"{graph.part}{' (backward)' if graph.backward else ''}, compiled"
        for node in graph.module.graph.nodes:
            if node.op != "call_function":
                continue
            name = str(node.target).removeprefix("aten.")
            if name.startswith(_MATMULS):
                values = [arg.meta["val"] for arg in node.args if isinstance(arg, torch.fx.Node)]
                matrices = values[1:3] if name.startswith("addmm") else values[:2]
                rate = self._matmul_rate(name.startswith("_scaled_mm"))
                moved = sum(map(_bytes, [*matrices, node.meta["val"]]))
                self._add(f"{part}: matmuls", _matmul_flops(*matrices), moved, rate)
            elif name.startswith("flex_attention"):
                q, k = (arg.meta["val"] for arg in node.args[:2])
                queries, keys = q.shape[0] * q.shape[2], k.shape[2]
                self._attention(part, graph.part, q.shape, queries, keys, backward="backward" in name)
            elif name.startswith("torch_attn._varlen_attn"):
                backward = "backward" in name
                q = node.args[int(backward)].meta["val"]
                longest = node.args[9 if backward else 6]
                self._attention(part, graph.part, q.shape, q.shape[0], longest, backward=backward)
        for kernel in graph.kernels:
            # Attention's own kernels, whose bytes are little beside their FLOPs.
            if "_tem_" not in kernel.name:
                self._add(f"{part}: fused kernels", 0, kernel.moved_bytes, math.inf)

    def result(self, *, micro_batches: int, model_flops: float, micro_batch_bytes: int) -> Roofline:
        """Return the estimate of what was counted since `forget`."""
        work = [
            Work(
                what,
                self._kernels[key] // micro_batches,
                seconds / micro_batches,
                self._flops[key] / micro_batches,
                self._bytes[key] / micro_batches,
            )
            for key, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])
            for update, what in [key]
            if not update
        ]
        return Roofline(
            work=work,
            update_seconds=sum(seconds for (update, _), seconds in self._seconds.items() if update),
            sent_bytes={name: size / micro_batches for name, size in self._sent.most_common()},
            model_flops=model_flops,
            micro_batch_bytes=micro_batch_bytes,
            assumptions=assumptions_of(self.card),
        )

    def _attention(
        self, part: str, model_part: str, shape: torch.Size, queries: int, keys: int, *, backward: bool
    ) -> None:
        attention = self.attention.get(model_part, Attention(None))
        heads, head_dim = shape[1], shape[-1]
        flops = 4 * queries * heads * attention.keys(keys) * head_dim * (_BACKWARD_WORK - 1 if backward else 1)
        rate = self.card.bf16_flops * attention.share(self.card, backward)
        self._add(f"{part}: attention", flops, 0, rate)

    def _matmul_rate(self, float8: bool) -> float:
        return (self.card.float8_flops if float8 else self.card.bf16_flops) * self.card.matmul_share

    def _add(self, what: str, flops: float, moved: float, rate: float, launches: int = 1) -> None:
        key = self.watch.phase in _UPDATE_PHASES, what
        bandwidth = self.card.bytes_per_s * self.card.bandwidth_share
        self._seconds[key] += max(moved / bandwidth, flops / rate) + self.card.launch_s * launches
        self._kernels[key] += launches
        self._flops[key] += flops
        self._bytes[key] += moved


def _moved(name: str, read: list[torch.Tensor], results: list[torch.Tensor]) -> tuple[str, float, int]:
    """Return the kind of an operation that is no matrix multiplication, the bytes that it moves, and its launches."""
    if name.startswith("_fused_adam"):
        # Parameters and two moments are read and written, gradients are read.
        return "optimizer", 1.75 * sum(map(_bytes, read)), 20
    if not results:
        return "elementwise", 2 * sum(map(_bytes, read)), 4
    written = sum(map(_bytes, results))
    if name.startswith("embedding."):
        return "gathers", 2 * written, 1
    if name.startswith("embedding_dense_backward"):
        gradient, index = read[:2]
        return "embedding gradients", 2 * _bytes(gradient) + 2 * written + 16 * _SORT_PASSES * index.numel(), 12
    if name.startswith("_embedding_bag") and "backward" in name:
        index, width = read[1].numel(), results[0].shape[1]
        return "hash gradients", 2 * index * max(32, 4 * width) + written + 16 * _SORT_PASSES * index, 14
    if name.startswith("_embedding_bag"):
        weight, index = read[:2]
        # A memory access is 32 bytes at least.
        return "hash look-ups", index.numel() * max(32, _bytes(weight[:1])) + written + _bytes(index), 2
    if name.startswith(("index_add", "scatter", "index_put")):
        return "scatters", _bytes(read[0]) + 3 * _bytes(read[-1]), 1
    return "elementwise", sum(map(_bytes_once, read)) + written, 1


def _matmul_flops(a: torch.Tensor, b: torch.Tensor) -> float:
    return 2.0 * a.numel() * b.shape[-1]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_once(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor whose expanded dimensions are read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride)
