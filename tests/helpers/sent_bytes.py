"""What a rank sends to others, counted from the collectives themselves."""

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_SEND_NOTHING = ("wait_tensor", "_wrap_tensor_autograd", "barrier")


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends in each kind of collective; an all-reduce counts its tensor once.

    Raises:
        AssertionError: a collective that it does not know.
    """

    def __init__(self):
        super().__init__()
        self.by_kind: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        # The functional collectives return what they fill; the others take it first, and then what is sent.
        if name in ("all_gather_into_tensor", "_allgather_base_"):
            part, whole = (args[0], result) if name == "all_gather_into_tensor" else (args[1], args[0])
            self._add("all_gather", whole.nbytes - part.nbytes)
        elif name in ("reduce_scatter_tensor", "_reduce_scatter_base_"):
            part, whole = (result, args[0]) if name == "reduce_scatter_tensor" else args[:2]
            self._add("reduce_scatter", whole.nbytes - part.nbytes)
        elif name == "all_to_all_single":
            splits, rows = args[2], args[0].shape[0]
            stays = splits[dist.get_rank() % len(splits)]  # groups are of consecutive ranks
            self._add("all_to_all", args[0].nbytes * (rows - stays) // max(rows, 1))
        elif name in ("all_reduce", "allreduce_"):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self._add("all_reduce", sum(tensor.nbytes for tensor in tensors))
        else:
            assert "c10d" not in func.namespace or name in _SEND_NOTHING, f"not counted: {func}"
        return result

    def _add(self, kind: str, n_bytes: int) -> None:
        self.by_kind[kind] = self.by_kind.get(kind, 0) + n_bytes
