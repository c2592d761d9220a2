"""The transformer block that all three stacks share: pre-norm attention with RoPE, then SwiGLU.

Letters: B rows, S slots (bytes or patches), D width of the stack, H heads, K head size, F hidden width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from blt_titan.model.attention import AttentionMask, attend
from blt_titan.model.eager import RMSNorm, gated_linear, is_plain, rotate_pairs

NORM_EPS = 1e-5

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMask], torch.Tensor]
"""Attention of queries, keys and values [B, S, H, K] under a mask."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of the rotary angles, each fp32 [B, S, 1, K / 2]."""


def swiglu_hidden(dim: int) -> int:
    """Return the usual SwiGLU hidden width: 2/3 of 4 * dim, rounded up to a multiple of 256.

    >>> swiglu_hidden(2048), swiglu_hidden(4096)
    (5632, 11008)
    """
    return -(-int(2 * 4 * dim / 3) // 256) * 256


def rotary_angles(pos_BS: torch.Tensor, *, head_dim: int, theta: float) -> Rotation:
    """Compute RoPE's cosines and sines for positions [B, S].

    The angles are made in float64: with fp32 angles, rows that should agree differ by 2e-3 nats at position 32k.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=pos_BS.device) / head_dim
    # In fp32, where comparisons take it too, theta**-exponent would round otherwise than transformers does.
    frequency_K = 1.0 / theta**exponent
    angle_BSK = pos_BS[..., None].double() * frequency_K
    return angle_BSK.cos().float()[:, :, None], angle_BSK.sin().float()[:, :, None]


def rotate(x_BSHK: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the interleaved pairs (2i, 2i + 1) of each head by the angles, in fp32."""
    cos, sin = rotation
    if is_plain(x_BSHK, cos):
        return rotate_pairs(x_BSHK, cos, sin)
    even, odd = x_BSHK.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BSHK)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, no biases."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x_BSD: torch.Tensor, rotation: Rotation, mask: AttentionMask, attend: Attend = attend
    ) -> torch.Tensor:
        """Attend within the row: [B, S, D] -> [B, S, D].

        Args:
            x_BSD: normed states.
            rotation: of their positions.
            mask: what each may see.
            attend: where keys and values come from that `x_BSD` does not give: a cache, other devices.
        """
        # -1 heads, not self.n_heads: under tensor parallelism a rank holds a part of them.
        q, k, v = (w(x_BSD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return self.wo(attend(rotate(q, rotation), rotate(k, rotation), v, mask).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] -> [..., D]."""
        return gated_linear(self.w1(x), self.w3(x), self.w2)


class TransformerBlock(nn.Module):
    """h = x + Attention(norm(x)); out = h + FeedForward(norm(h))."""

    def __init__(self, dim: int, n_heads: int, ffn_hidden: int):
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=NORM_EPS)
        self.attention = Attention(dim, n_heads)
        self.ffn_norm = RMSNorm(dim, eps=NORM_EPS)
        self.feed_forward = FeedForward(dim, ffn_hidden)

    def forward(
        self, x_BSD: torch.Tensor, rotation: Rotation, mask: AttentionMask, attend: Attend = attend
    ) -> torch.Tensor:
        """Map [B, S, D] -> [B, S, D]; the other arguments are those of `Attention`."""
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation, mask, attend)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


def run_blocks(
    blocks: nn.ModuleDict, h_BSD: torch.Tensor, rotation: Rotation, mask: AttentionMask, attends: Sequence[Attend]
) -> torch.Tensor:
    """Run a stack: [B, S, D] -> [B, S, D].

    Args:
        blocks: of the stack.
        h_BSD: what enters the first.
        rotation: of the positions.
        mask: what each position may see.
        attends: attention of each block.
    """
    for block, own_attend in zip(blocks.values(), attends, strict=True):
        h_BSD = block(h_BSD, rotation, mask, own_attend)
    return h_BSD


def block_stack(n_layers: int, dim: int, n_heads: int, ffn_hidden: int) -> nn.ModuleDict:
    """Return `n_layers` blocks keyed "0", "1", ...: a dict, so that a pipeline stage keeps its layers' names."""
    return nn.ModuleDict({str(i): TransformerBlock(dim, n_heads, ffn_hidden) for i in range(n_layers)})
