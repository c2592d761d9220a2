"""Activation checkpointing: torchtitan's on the global blocks, a switch of its own for the local models."""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch._higher_order_ops import flex_attention
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from blt_titan.titan import apply_ac

OPS_TO_SAVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    flex_attention,
    # What tensor parallelism sent, and what float8 scales with.
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops.aten.max.default,
}
"""Results that selective activation checkpointing keeps, because they cost most to compute again.

Where blocks are not compiled but run on CUDA, FlexAttention is a compiled region of its own, which the policy does not
see: it is computed again.
"""


RECEIVED = [torch.ops._c10d_functional.all_to_all_single.default]
"""How the bytes before a slice come from other ranks."""


def checkpoint_global_blocks(model: nn.Module, settings: Any, *, compiled: bool, dump_folder: str) -> None:
    """Wrap the blocks in `layers` as `[activation_checkpoint]` says."""
    apply_ac(
        model,
        settings,
        model_compile_enabled=compiled,
        op_sac_save_list=OPS_TO_SAVE,  # pyright: ignore[reportArgumentType]
        base_folder=dump_folder,
    )


def checkpoint_local_blocks(model: nn.Module, *, keep_received: bool = False) -> None:
    """Wrap every block and every cross-attention of encoder and decoder: each is computed again in backward.

    Args:
        model: by the names of its parts.
        keep_received: keep the keys and values that came from other ranks. Compiled slices need it: the first rank of a
            row receives nothing, so its compiler would leave the exchange out of backward, and the others would wait.
    """
    kept: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, RECEIVED)} if keep_received else {}
    )
    for name in ("encoder", "decoder"):
        part = getattr(model, name, None)
        if part is None:
            continue
        for stack in (part.layers, part.cross_attention):
            for key, module in list(stack.named_children()):
                stack.register_module(key, checkpoint_wrapper(module, preserve_rng_state=False, **kept))
