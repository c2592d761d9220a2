"""What autograd keeps between forward and backward."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes:
    """Sizes of the storages that were saved for backward, each counted once, parameters left out."""

    def __init__(self, model: nn.Module):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        self._parameters = {tensor.untyped_storage().data_ptr() for tensor in local}
        self._storages: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that no address is used twice

    @property
    def total(self) -> int:
        return sum(self._storages.values())

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what is saved inside the block."""
    counter = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        yield counter
    counter._alive.clear()


class LiveBytes(TorchDispatchMode):
    """Storages that were made inside the block and are alive when asked.

    Selective checkpointing keeps results where no saved-tensor hook sees them.
    """

    def __init__(self):
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def total(self) -> int:
        gc.collect()
        return sum(n_bytes for storage, n_bytes in self._storages.values() if not storage.expired())
