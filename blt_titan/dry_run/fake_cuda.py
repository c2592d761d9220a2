"""A "cuda" device without a card: what torch.cuda says, answered from a `Card`.

    install(CARDS["h100"])              # before blt_titan.titan is imported, in a process with the stubs
    with FakeTensorMode(): ...          # forward and backward on device="cuda"; tensors have shapes and no data

Only a process of its own may do this: it stays so until the process ends.
"""

import ctypes
import importlib
from types import SimpleNamespace
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from blt_titan.dry_run.cards import Card

_DEVICES = 127
"""What the stub counts: autograd asks whether each device that it meets is below it."""


class _Stream:
    """A stream on which nothing runs."""

    device = torch.device("cuda", 0)
    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *args: Any, **options: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *raised: Any) -> None:
        pass


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


_STREAM = _Stream()


def device_properties(card: Card) -> SimpleNamespace:
    """Return the properties of a card as torch gives them."""
    return SimpleNamespace(
        name=card.device_name,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=card.multiprocessors,
        total_memory=card.memory_bytes,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65_536,
        warp_size=32,
        L2_cache_size=50 * 2**20,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=card.shared_bytes,
        shared_memory_per_multiprocessor=card.shared_bytes + 1024,
        gcnArchName="",
        uuid="0",
        is_integrated=0,
    )


def device_functions(card: Card) -> dict[str, Any]:
    """Return stand-ins for the functions of `torch.cuda`, by name."""
    properties = device_properties(card)
    memory = card.memory_bytes
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": card.capability,
        "get_device_properties": properties,
        "get_device_name": card.device_name,
        "is_bf16_supported": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "current_stream": _STREAM,
        "default_stream": _STREAM,
        "stream": _STREAM,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "mem_get_info": (memory, memory),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    silent = (
        "set_device synchronize _lazy_init init set_rng_state manual_seed manual_seed_all set_stream empty_cache "
        "reset_peak_memory_stats ipc_collect"
    )
    functions: dict[str, Any] = {name: _always(answer) for name, answer in answers.items()}
    functions |= {name: _always(None) for name in silent.split()}
    return functions | {
        "memory_stats": lambda device=None: {},
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
    }


def _always(answer: Any) -> Any:
    return lambda *args, **options: answer


def install(card: Card, *, stub: str) -> None:
    """Have this process see one card, whose kernels are never launched.

    Args:
        card: which.
        stub: path of the library that counts devices; this process was started with it.
    """
    assert torch.version.cuda is not None, "a build of torch without CUDA"
    # torch registers a guard that does nothing while no device is counted; then the count may rise.
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(stub).dry_run_set_device_count(_DEVICES)
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # pyright: ignore[reportAttributeAccessIssue]
    fake_tensor.init_gpu_context = lambda device: None  # pyright: ignore[reportAttributeAccessIssue]
    for name, function in device_functions(card).items():
        setattr(torch.cuda, name, function)
    # Dynamo looks at the real classes when it is imported.
    importlib.import_module("torch._dynamo.device_interface")
    importlib.import_module("torch._inductor.compile_fx")

    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event  # pyright: ignore[reportAttributeAccessIssue]
    for name, answer in (("getCurrentRawStream", 0), ("exchangeDevice", 0), ("maybeExchangeDevice", 0)):
        setattr(torch._C, f"_cuda_{name}", _always(answer))
    let_meshes_be_real()


def let_meshes_be_real() -> None:
    """Make device meshes outside of the fake mode: they hold ranks, which must be numbers that can be read."""
    make = DeviceMesh.__init__

    def make_real(self: DeviceMesh, *args: Any, **options: Any) -> None:
        with unset_fake_temporarily():
            make(self, *args, **options)

    DeviceMesh.__init__ = make_real
    join: Any = getattr(DeviceMesh, "_concatenate", None)
    if join is None:
        return

    def join_real(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return join(*args, **options)

    DeviceMesh._concatenate = staticmethod(join_real)  # pyright: ignore[reportAttributeAccessIssue]
