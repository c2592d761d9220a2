"""Watch every tensor operation of forward and backward: for reads by the host, and for tensors that are too large."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Each one makes the host wait for the device, or gives a shape that depends on data.
HOST_READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.masked_select,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class NoHostRead(TorchDispatchMode):
    """Fail at the first operation that reads a tensor's values on the host."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func._overloadpacket
        self.seen.add(packet.__name__)
        by_mask = packet in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if packet in HOST_READS or by_mask:
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Remember the tensor of most elements that an operation made, views included."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()
        self.numel = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._overloadpacket.__name__)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
                self.shapes.add(tuple(leaf.shape))
        return result
