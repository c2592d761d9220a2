"""How long this rank computes, without what it waits for from others: the forward of its global blocks in one step.

All ranks of a run take the same time for a step, because each waits for the slowest. What differs is how long a block
takes once its weights are gathered:

    rank 0   [gather][block]......[gather][block]......     waits: its blocks take 10 ms
    rank 1   [gather][block     ] [gather][block     ]      is waited for: 14 ms

So the clock starts after FSDP's hook before a block and stops before the one after it; on a GPU by events of the
stream, which nobody waits for. Ranks that share rows (cp, tp) talk within a block, and share its time.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn


class BlockTimes:
    """Times the blocks of a model, where `on` is true.

    Args:
        model_parts: the models or stages of this rank, each with its global blocks in `layers`, already sharded.
        device: theirs.
    """

    def __init__(self, model_parts: Iterable[nn.Module], device: torch.device):
        self.on = False
        self._on_gpu = device.type == "cuda"
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []
        # A compiled block calls its hooks outside of its graph, if they are not to be compiled.
        begin: Any = torch.compiler.disable(self._begin)
        end: Any = torch.compiler.disable(self._end)
        for part in model_parts:
            for block in part.get_submodule("layers").children():
                # After FSDP's hook before a block, which was there first, and before its hook after the block.
                block.register_forward_pre_hook(begin)
                block.register_forward_hook(end, prepend=True)

    def take(self) -> float:
        """Return the seconds since the last call; the device must have come to the end of them."""
        spans, self._spans = self._spans, []
        if self._on_gpu:
            return sum(began.elapsed_time(ended) for began, ended in spans) / 1e3
        return sum(ended - began for began, ended in spans)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if self.on:
            self._began = self._mark()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.on:
            self._spans.append((self._began, self._mark()))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
