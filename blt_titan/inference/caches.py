"""Key/value caches of the three stacks, as what `Attention.attend` is replaced by.

A stack first reads prompts, all bytes at once, and then goes on byte by byte (the global one patch by patch):

    ring, W = 4     position   0 1 2 3 | 4 5      slot = position mod W; a key goes over the one that left the window
                    slots      4 5 2 3
    grown           slots      0 1 2 3 4 5 . .    in steps of GROWTH_SLOTS, so that there are few shapes

Shapes are fixed between growths and nothing here asks the device for a number. A model that carries caches must not be
trained or called otherwise.

Letters: B rows, S slots of a prompt, T slots of a cache, H heads, K head size.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from blt_titan.model.attention import AttentionMask, attend
from blt_titan.model.layers import Rotation, rotary_angles

GROWTH_SLOTS = 256


class LayerCache:
    """The cache of one layer; called in place of `attend`."""

    def __init__(self, stack: "StackCache"):
        self._stack = stack
        self.k_BTHK: torch.Tensor | None = None
        self.v_BTHK: torch.Tensor | None = None

    def __call__(
        self, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, mask: AttentionMask | None
    ) -> torch.Tensor:
        """Attend in a prompt under its mask, or, without one, from the next slot of each row to the cache."""
        if mask is not None:
            self._fill(k_BSHK, v_BSHK)
            return attend(q_BSHK, k_BSHK, v_BSHK, mask)
        stack, k, v = self._stack, *self._held()
        k[stack.rows, stack.slot_B] = k_BSHK[:, 0]
        v[stack.rows, stack.slot_B] = v_BSHK[:, 0]
        q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=stack.visible_B11T).transpose(1, 2)

    def _fill(self, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> None:
        """Keep what a prompt's keys and values leave in the cache."""
        source_BT, there_BT = self._stack.from_prompt(k_BSHK.shape[1])
        there = there_BT[..., None, None]
        rows = self._stack.rows[:, None]
        self.k_BTHK = torch.where(there, k_BSHK[rows, source_BT], 0)
        self.v_BTHK = torch.where(there, v_BSHK[rows, source_BT], 0)

    def grow(self, slots: int) -> None:
        """Make room for so many slots."""
        k, v = self._held()
        more = (0, 0, 0, 0, 0, slots - k.shape[1])
        self.k_BTHK, self.v_BTHK = F.pad(k, more), F.pad(v, more)

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.k_BTHK is not None
        assert self.v_BTHK is not None
        return self.k_BTHK, self.v_BTHK


class StackCache:
    """The caches of a stack's layers and what they share: positions, slots, and what a query may see.

    Args:
        blocks: of the stack; their attention is replaced.
        window: W of a ring; None for a cache that grows.
        head_dim: K.
        theta: RoPE base.
    """

    def __init__(self, blocks: nn.ModuleDict, *, window: int | None, head_dim: int, theta: float):
        self._window, self._head_dim, self._theta = window, head_dim, theta
        self._attention: list[Any] = [block.get_submodule("attention") for block in blocks.children()]
        self.layers = [LayerCache(self) for _ in self._attention]
        self._angles: Rotation | None = None

    def begin(self, lengths_B: torch.Tensor, most: int) -> None:
        """Take the lengths of prompts (of the real slots of each row), integer [B]; the longest is `most`."""
        device = lengths_B.device
        self.lengths_B = lengths_B.long()
        self.rows = torch.arange(len(lengths_B), device=device)
        self.capacity = self._window if self._window is not None else _rounded(most)
        self._slots_T = torch.arange(self.capacity, device=device)
        self._source_BT = self._slots_T.expand(len(lengths_B), -1)
        if self._window is not None:
            # The newest position of each slot that lies in the prompt.
            behind_BT = (self.lengths_B[:, None] - 1 - self._slots_T) // self._window
            self._source_BT = self._slots_T + self._window * behind_BT
        self._there_BT = (self._source_BT >= 0) & (self._source_BT < self.lengths_B[:, None])
        self.context_BT = torch.where(self._there_BT, 0, -1)

    def from_prompt(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which slot of the prompt each slot of the cache holds, int64 [B, T], and whether it holds one."""
        return self._source_BT.clamp(0, slots - 1), self._there_BT

    def step(self, pos_B: torch.Tensor, context_B: torch.Tensor | None = None) -> Rotation:
        """Prepare for the next slot of each row; return its rotation.

        Args:
            pos_B: its position, int64 [B].
            context_B: a slot sees those of its own number only, int64 [B]; None for all.
        """
        if self._window is None:
            self.slot_B = pos_B
            visible_BT = self._slots_T <= pos_B[:, None]
        else:
            self.slot_B = pos_B % self._window
            # An older position of the slot has left the window just now.
            held_BT = self._slots_T + self._window * ((pos_B[:, None] - self._slots_T) // self._window)
            visible_BT = held_BT >= 0
        if context_B is not None:
            self.context_BT[self.rows, self.slot_B] = context_B
            visible_BT = visible_BT & (self.context_BT == context_B[:, None])
        self.visible_B11T = visible_BT[:, None, None]
        assert self._angles is not None
        cos, sin = self._angles
        return cos[pos_B], sin[pos_B]

    def reserve(self, positions: int) -> None:
        """Make room for positions below this."""
        if self._angles is None or len(self._angles[0]) < positions:
            table_1S = torch.arange(max(1024, 1 << (positions - 1).bit_length()), device=self.rows.device)[None]
            cos, sin = rotary_angles(table_1S, head_dim=self._head_dim, theta=self._theta)
            self._angles = cos[0][:, None], sin[0][:, None]
        if self._window is None and positions > self.capacity:
            self.capacity = _rounded(positions)
            self._slots_T = torch.arange(self.capacity, device=self.rows.device)
            for layer in self.layers:
                layer.grow(self.capacity)

    def install(self) -> None:
        """Let the blocks attend to the caches."""
        for attention, cache in zip(self._attention, self.layers, strict=True):
            attention.attend = cache

    def release(self) -> None:
        """Let the blocks attend as they did before."""
        for attention in self._attention:
            attention.attend = attend

    @property
    def bytes_held(self) -> int:
        """Of all keys and values."""
        return sum(2 * layer.k_BTHK.nbytes for layer in self.layers if layer.k_BTHK is not None)


def _rounded(slots: int) -> int:
    return -(-max(1, slots) // GROWTH_SLOTS) * GROWTH_SLOTS
