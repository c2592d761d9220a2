"""Initial weights that depend on the seed and the parameter's name alone, not on how the model is split.

Every matrix and table is drawn from a normal of std = (its last dimension)^-0.5, cut at 3 std; norms are 1. That one
rule covers the contract: attention and w1/w3 have last dimension `dim`, w2 `hidden`, tables and output the local
width, projections their `in_features`. An optional depth factor divides the std of a block's two output matrices.

Each tensor is drawn whole from a generator of its own, so a rank that keeps a slice of it keeps the slice that the
single process would have. Hash tables are too large for that: they are drawn column by column.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn as nn

DepthScaling = Literal["none", "current", "total"]

WriteParameter = Callable[[nn.Parameter, torch.Tensor], None]
"""Stores a full tensor into a parameter, which may hold only a slice of it."""

LocalColumns = Callable[[nn.Parameter], tuple[torch.Tensor, range] | None]
"""The part of a table that this device stores, and which columns it is; None if it is not whole columns."""

_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")
_BLOCK_OUTPUT = re.compile(r"^(?P<stack>(?:\w+\.)?layers)\.(?P<layer>\d+)\.(attention\.wo|feed_forward\.w2)\.weight$")


def write_whole(parameter: nn.Parameter, full: torch.Tensor) -> None:
    """Store a full tensor into a parameter that is not split."""
    parameter.copy_(full)


def all_columns(parameter: nn.Parameter) -> tuple[torch.Tensor, range]:
    """Return a table that is not split."""
    return parameter.data, range(parameter.shape[1])


@torch.no_grad()
def initialize(
    model: nn.Module,
    *,
    seed: int,
    depth_scaling: DepthScaling,
    stack_depths: dict[str, int],
    write: WriteParameter = write_whole,
    local_columns: LocalColumns = all_columns,
) -> None:
    """Set every parameter of `model`.

    Args:
        model: the model or a part of it; parameter names count, so a part keeps the names of the whole.
        seed: the run's seed.
        depth_scaling: divide the std of `wo` and `w2` in layer l of a stack of L by nothing ("none"),
            sqrt(2 (l + 1)) ("current") or sqrt(2 (L + 1)) ("total").
        stack_depths: L by stack name (`encoder.layers`, `layers`, `decoder.layers`), of the whole model.
        write: how a full tensor enters a parameter; `parallelisms` passes one that keeps a rank's slice.
        local_columns: which columns of a hash table to draw.
    """
    for wrapped_name, parameter in model.named_parameters():
        name = _WRAPPERS.sub("", wrapped_name)
        if parameter.ndim == 1:
            write(parameter, torch.ones(parameter.shape, dtype=parameter.dtype, device=parameter.device))
            continue
        std = parameter.shape[-1] ** -0.5
        if block := _BLOCK_OUTPUT.match(name):
            depths = {"none": None, "current": int(block["layer"]), "total": stack_depths[block["stack"]]}
            if (depth := depths[depth_scaling]) is not None:
                std /= (2 * (depth + 1)) ** 0.5
        if not name.startswith("hash_embedding."):
            write(parameter, _draw_whole(name, parameter, std, seed))
        elif (stored := local_columns(parameter)) is not None:
            _draw_columns(*stored, name, std, seed)
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            _draw_columns(whole, range(parameter.shape[1]), name, std, seed)
            write(parameter, whole)


def _draw_whole(name: str, parameter: nn.Parameter, std: float, seed: int) -> torch.Tensor:
    full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return _truncated_normal(full, std, name, seed)


def _draw_columns(out: torch.Tensor, columns: range, name: str, std: float, seed: int) -> None:
    for stored, column in zip(out.unbind(1), columns, strict=True):
        stored.copy_(_truncated_normal(torch.empty_like(stored), std, f"{name}/{column}", seed))


def _truncated_normal(tensor: torch.Tensor, std: float, name: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=tensor.device)
    # The CPU's generator reads only the low 32 bits of its seed: both must reach all of them.
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return nn.init.trunc_normal_(tensor, std=std, a=-3 * std, b=3 * std, generator=generator)
