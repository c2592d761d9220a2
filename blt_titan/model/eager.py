"""What blocks compute where they are not compiled: the same functions in fewer passes, and keeping less for backward.

A compiler fuses elementwise work and computes it again in backward by itself; without one, autograd keeps every
intermediate. These say by hand what a compiler finds out: a norm keeps its input and one number a row, a gated
feed-forward its two projections and not their product. Results are those of the plain form, forward and backward, up to
the order of sums in the norm.

Letters: D width, F hidden width, H heads, K head size.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)
"""Types of tensors on one device. Those of a dry run are among them: it must keep what a run keeps."""


def is_plain(*tensors: torch.Tensor) -> bool:
    """Tell whether nothing but eager PyTorch looks at these: no compiler, no tensors that are spread over ranks."""
    return not torch.compiler.is_compiling() and all(type(x) in _PLAIN for x in tensors)


class RMSNorm(nn.RMSNorm):
    """x / root(mean(x^2) + eps) * weight over the last dim. PyTorch on a CPU would keep two more of x's size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] -> [..., D]."""
        assert self.eps is not None
        if x.device.type != "cpu" or not is_plain(x, self.weight) or x.dtype != self.weight.dtype:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


def gated_linear(gate: torch.Tensor, x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """Return linear(silu(gate) * x), [..., F] -> [..., D], without keeping the product for backward."""
    if type(linear) is nn.Linear and is_plain(gate, x, linear.weight) and not linear._forward_pre_hooks:
        return _GatedLinear.apply(gate, x, linear.weight)  # pyright: ignore[reportReturnType]
    return linear(F.silu(gate) * x)


def rotate_pairs(x_BSHK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) by angles [B, S, 1, K / 2]: as complex numbers, one pass instead of six."""
    pairs = torch.view_as_complex(x_BSHK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x_BSHK)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        d_weight = (gradient * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        d_x = gradient * weight
        along = torch.linalg.vecdot(d_x, normed)[..., None].div_(x.shape[-1])
        d_x.addcmul_(normed, along, value=-1).mul_(scale)
        return d_x, d_weight, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, x, weight)
        # In the type of the projections: an autocast has chosen it, and is not there in backward.
        return F.linear(F.silu(gate).mul_(x), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, x, weight = ctx.saved_tensors
        gradient = gradients[0].to(gate.dtype)
        activated = F.silu(gate)
        d_weight = None
        if ctx.needs_input_grad[2]:
            product = (activated * x).flatten(0, -2)
            d_weight = (gradient.flatten(0, -2).t() @ product).to(weight.dtype)
        d_product = gradient @ weight.to(gate.dtype)
        d_x = activated.mul_(d_product)
        d_gate = torch.ops.aten.silu_backward(d_product.mul_(x), gate)
        return d_gate, d_x, d_weight
