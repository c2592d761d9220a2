"""Sees every operation of a step as it reaches the device, and where in the model it belongs.

Observers (`memory`, `host_reads`, `traffic`) are told of each operation with its results. What is traced for a
compiler does not count: it is seen when the graph runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch._guards
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_ANSWER = object()
"""An observer lets the operation run."""

LOCAL_PARTS = ("hash_embedding", "encoder", "decoder")
GLOBAL_PART, OTHER_PART = "blocks", "elsewhere"

SCHEDULE = "schedule"
"""The phase of a pipeline's schedule, which is forward and backward by turns."""


class Observer(Protocol):
    """What watches operations."""

    def before(self, op: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Answer in place of the operation, or return NO_ANSWER."""

    def after(self, op: str, inputs: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Note an operation and its result."""


class Watch(TorchDispatchMode):
    """The mode that shows operations to observers. `phase` and `part` say when and where an operation happens."""

    supports_higher_order_operators = True

    def __init__(self, observers: Sequence[Observer]):
        super().__init__()
        self.observers = observers
        self._phase = "setup"
        self.part = OTHER_PART
        self.in_graph = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Say to Dynamo that this mode changes nothing that it must know of."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and tell the observers."""
        options = kwargs or {}
        if torch._guards.TracingContext.try_get() is not None:
            return func(*args, **options)
        op = str(func)
        for observer in self.observers:
            answer = observer.before(op, args, options)
            if answer is not NO_ANSWER:
                return answer
        result = func(*args, **options)
        for observer in self.observers:
            observer.after(op, args, options, result)
        return result

    @property
    def phase(self) -> str:
        """What the step is at."""
        if self._phase != SCHEDULE:
            return self._phase
        return "backward" if torch._C._current_graph_task_id() >= 0 else "forward"

    @contextmanager
    def at(self, *, phase: str | None = None, part: str | None = None, in_graph: bool | None = None) -> Iterator[None]:
        """Say where the operations within the context belong."""
        before = self._phase, self.part, self.in_graph
        self._phase, self.part = phase or self._phase, part or self.part
        self.in_graph = self.in_graph if in_graph is None else in_graph
        try:
            yield
        finally:
            self._phase, self.part, self.in_graph = before

    def follow(self, model: nn.Module) -> None:
        """Note which part of the model runs, in forward and where it is computed again."""
        for name in LOCAL_PARTS:
            module = getattr(model, name, None)
            if isinstance(module, nn.Module):
                self._follow(module, name)
        for block in model.get_submodule("layers").children():
            self._follow(block, GLOBAL_PART)

    def _follow(self, module: nn.Module, part: str) -> None:
        compiled: Callable[..., Any] | None = module._compiled_call_impl
        if compiled is not None:
            # A hook would be compiled with the module.
            def call(*args: Any, **options: Any) -> Any:
                with self.at(part=part):
                    return compiled(*args, **options)

            module._compiled_call_impl = call
            return
        outer: list[str] = []

        def enter(module: nn.Module, args: Any) -> None:
            outer.append(self.part)
            self.part = part

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self.part = outer.pop()

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a distributed tensor; others as they are."""
    return getattr(tensor, "_local_tensor", tensor)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Return all tensors in arguments or results."""
    return [plain(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
