"""torch.compile without a card: graphs are captured, their kernels generated and assembled, and never launched.

Stands where Inductor's backend is looked up, so whatever is compiled, and by whom, comes through here. A compiled graph
is run by interpreting its operations on tensors without data. With `kernels=False` no code is generated: graphs, what
they keep for backward and their memory are the same, in seconds.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
from torch._dynamo.utils import counters
from torch._inductor.output_code import OutputCode
from torch._inductor.runtime import triton_helpers, triton_heuristics

from blt_titan.dry_run.cards import Card
from blt_titan.dry_run.fake_cuda import device_functions, device_properties
from blt_titan.dry_run.kernels import Kernel, resources, use_target

_ASKED_OF_THE_INTERFACE = (
    "current_device",
    "set_device",
    "device_count",
    "synchronize",
    "get_device_properties",
    "current_stream",
    "set_stream",
    "memory_allocated",
    "is_bf16_supported",
)


@dataclasses.dataclass
class Graph:
    """A compiled graph."""

    number: int
    backward: bool
    module: torch.fx.GraphModule
    inputs: list[str]
    """Shapes, or names of symbols."""
    symbolic: list[str]
    """Inputs whose sizes are symbols, or that are symbols."""
    kernels: list[Kernel]
    part: str
    """The part of the model that was running; for a backward, that of its forward."""
    after_first: bool
    """It was compiled after the first micro-batch, so a step compiles again."""


@dataclasses.dataclass
class _Interpreted(OutputCode):
    """A graph in the form that AOTAutograd takes: runs its operations one by one."""

    graph: Graph
    around: Callable[[Graph], AbstractContextManager[None]]
    _boxed_call: bool = True

    def __call__(self, inputs: Sequence[Any]) -> Any:
        arguments = list(inputs)
        if isinstance(inputs, list):
            inputs.clear()  # what is not needed again is free
        with self.around(self.graph):
            return list(torch.fx.Interpreter(self.graph.module).boxed_run(arguments))

    def post_compile(self, *args: Any, **options: Any) -> None:
        pass

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        pass


class Compiler:
    """Takes Inductor's place.

    Args:
        card: what is compiled for.
        kernels: generate kernels and assemble them too.
        around: entered while a graph runs.
        part: gives the part of the model that runs.
    """

    def __init__(
        self,
        card: Card,
        *,
        kernels: bool,
        around: Callable[[Graph], AbstractContextManager[None]],
        part: Callable[[], str],
        progress: Callable[[str], None],
    ):
        self.card = card
        self.kernels = kernels
        self.around = around
        self.part = part
        self.progress = progress
        self.graphs: list[Graph] = []
        self.first_is_over = False
        self._made: list[Kernel] = []
        self._part_of: dict[Any, str] = {}

    def install(self, device: str = "cuda") -> None:
        """Stand in Inductor's place until the process ends; on "cpu" no kernels are generated."""
        if device == "cuda":
            self._install_device()
        settings: Any = inductor_config
        settings.joint_graph_constant_folding = False  # it would compute on the device
        settings.fx_graph_cache = settings.fx_graph_remote_cache = False
        torch._functorch.config.enable_autograd_cache = False  # pyright: ignore[reportAttributeAccessIssue]
        inner, outer = compile_fx.compile_fx_inner, compile_fx.compile_fx

        def compile_graph(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
            return self._compile(inner, module, inputs, options)

        def compile_any(*args: Any, **options: Any) -> Any:
            options.setdefault("inner_compile", compile_graph)
            return outer(*args, **options)

        compile_fx.compile_fx = compile_any  # pyright: ignore[reportAttributeAccessIssue]

    def _install_device(self) -> None:
        functions = device_functions(self.card)
        for name in _ASKED_OF_THE_INTERFACE:
            setattr(device_interface.CudaInterface, name, staticmethod(functions[name]))
        for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream"):
            setattr(device_interface.CudaInterface, name, staticmethod(lambda device: 0))
        device_interface.caching_worker_device_properties["cuda"] = [device_properties(self.card)]
        device_interface.caching_worker_current_devices["cuda"] = 0
        use_target(self.card)
        triton_helpers.set_driver_to_gpu = lambda: None
        settings: Any = inductor_config
        settings.compile_threads = 1
        settings.shape_padding = False  # whether it pays is found by timing products
        settings.benchmark_kernel = True  # then kernels say how many bytes they move
        if hasattr(settings, "use_static_cuda_launcher"):
            settings.use_static_cuda_launcher = False
        note = self._made.append

        def precompile(tuner: Any, *args: Any, **options: Any) -> None:
            options.pop("reload_kernel", None)
            tuner._precompile_worker()
            note(resources(tuner, self.card))

        triton_heuristics.CachingAutotuner.precompile = precompile  # pyright: ignore[reportAttributeAccessIssue]

    def graph_breaks(self) -> list[str]:
        """Return why Dynamo left a function uncompiled in the middle."""
        return [" ".join(str(reason).split())[:300] for reason in counters["graph_break"]]

    def _compile(self, inner: Any, module: torch.fx.GraphModule, inputs: Sequence[Any], options: Any) -> Any:
        backward, graph_id = bool(options.get("is_backward")), options.get("graph_id")
        part = self._part_of.get(graph_id, self.part()) if backward else self.part()
        self._part_of[graph_id] = part
        graph = Graph(
            number=len(self.graphs),
            backward=backward,
            module=copy.deepcopy(module),
            inputs=[str(tuple(x.shape)) if isinstance(x, torch.Tensor) else str(x) for x in inputs],
            symbolic=[_shown(x) for x in inputs if is_symbolic(x)],
            kernels=[],
            part=part,
            after_first=self.first_is_over,
        )
        self.graphs.append(graph)
        if self.kernels:
            way = "backward" if graph.backward else "forward"
            self.progress(f"graph {graph.number} ({graph.part}, {way}): generating kernels")
            begin = len(self._made)
            inner(module, inputs, **options)
            graph.kernels = self._made[begin:]
        return _Interpreted(graph, self.around)


def is_symbolic(value: Any) -> bool:
    """Tell whether an input of a graph is a symbol, or a tensor with a size that is one."""
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt | torch.SymFloat)


def _shown(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value)
