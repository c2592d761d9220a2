"""Key/value caches of a stack, which its blocks attend to; they are handed over with each call, the model keeps none.

A stack first reads prompts, all bytes at once, and then goes on byte by byte (the global one patch by patch):

    ring, W = 4     position   0 1 2 3 | 4 5      slot = position mod W; a key goes over the one that left the window
                    slots      4 5 2 3
    grown           slots      0 1 2 3 4 5 . .    in steps of GROWTH_SLOTS, so that there are few shapes

Shapes are fixed between growths and nothing here makes the host wait for the device.

Letters: B rows, S slots of a prompt, T slots of a cache, H heads, K head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from blt_titan.model.attention import AttentionMask, DenseMask, attend, dense_mask
from blt_titan.model.layers import Attend, Rotation, rotary_angles

GROWTH_SLOTS = 256


class LayerCache:
    """The keys and values of one layer, and attention to them."""

    def __init__(self, stack: "StackCache"):
        self._stack = stack
        self.k_BTHK: torch.Tensor | None = None
        self.v_BTHK: torch.Tensor | None = None

    def attend_in_prompt(
        self, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        """Attend within prompts, and keep what their keys and values leave in the cache."""
        source_BT, filled_BT = self._stack.slots_from_prompt(k_BSHK.shape[1])
        filled_BT11 = filled_BT[..., None, None]
        rows = self._stack.rows[:, None]
        self.k_BTHK = torch.where(filled_BT11, k_BSHK[rows, source_BT], 0)
        self.v_BTHK = torch.where(filled_BT11, v_BSHK[rows, source_BT], 0)
        return attend(q_BSHK, k_BSHK, v_BSHK, mask)

    def attend_to_cache(
        self, q_B1HK: torch.Tensor, k_B1HK: torch.Tensor, v_B1HK: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        """Attend from the next slot of each row, which is kept first, to the cache."""
        stack, k, v = self._stack, *self._held()
        k[stack.rows, stack.slot_B] = k_B1HK[:, 0]
        v[stack.rows, stack.slot_B] = v_B1HK[:, 0]
        return attend(q_B1HK, k, v, mask)

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
        n_layers: of the stack.
        window: W of a ring; None for a cache that grows.
        head_dim: K.
        theta: RoPE base.
    """

    def __init__(self, n_layers: int, *, window: int | None, head_dim: int, theta: float):
        self._window, self._head_dim, self._theta = window, head_dim, theta
        self.layers = [LayerCache(self) for _ in range(n_layers)]
        self._angles: Rotation | None = None

    @property
    def in_prompt(self) -> Sequence[Attend]:
        """Attention of each layer while prompts are read."""
        return [layer.attend_in_prompt for layer in self.layers]

    @property
    def to_cache(self) -> Sequence[Attend]:
        """Attention of each layer in a step."""
        return [layer.attend_to_cache for layer in self.layers]

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
        self._filled_BT = (self._source_BT >= 0) & (self._source_BT < self.lengths_B[:, None])
        self.context_BT = torch.where(self._filled_BT, 0, -1)

    def slots_from_prompt(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which slot of the prompt each slot of the cache holds, int64 [B, T], and whether it holds one."""
        return self._source_BT.clamp(0, slots - 1), self._filled_BT

    def step(self, pos_B: torch.Tensor, context_B: torch.Tensor | None = None) -> tuple[Rotation, DenseMask]:
        """Prepare for the next slot of each row; return its rotation, and what it sees of the cache.

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
        assert self._angles is not None
        cos, sin = self._angles
        return (cos[pos_B], sin[pos_B]), dense_mask(visible_BT[:, None, None])

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

    @property
    def bytes_held(self) -> int:
        """Bytes of all keys and values."""
        return sum(2 * layer.k_BTHK.nbytes for layer in self.layers if layer.k_BTHK is not None)


def _rounded(slots: int) -> int:
    return -(-max(1, slots) // GROWTH_SLOTS) * GROWTH_SLOTS
