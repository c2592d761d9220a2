"""Cross-attention between bytes and patches, by index: no [P * k, S] mask is ever built.

Every byte lies in one patch and reads one patch, so visibility is a relation between a byte and an index:

    encoder: the k queries of a patch see that patch's bytes  -> softmax over the bytes that share an index
    decoder: a byte sees the k slots of its source patch      -> softmax over those k slots

Both indices grow along a row, so what shares one lies side by side: a patch is a run of byte slots (`kernels`). At 16
rows of 24,576 bytes a dense mask would hold 81 GiB; this holds k weights per byte and head. A query with nothing to see
(an empty patch, a padded byte) yields exactly 0, with finite gradients.

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), H heads, K head size.
"""

from typing import NamedTuple

import torch
import torch.nn as nn

from blt_titan.model.eager import RMSNorm
from blt_titan.model.kernels.gather_attention import gather_attention
from blt_titan.model.kernels.offsets import first_of_patches
from blt_titan.model.kernels.segment_attention import segment_attention
from blt_titan.model.layers import NORM_EPS


class PatchRuns(NamedTuple):
    """Which patch each byte belongs to, or reads, and where the bytes of each patch are."""

    patch_BS: torch.Tensor
    """The patch of each byte, int32 [B, S], negative for none; it grows along the row, but for bytes without one, which
    may lie before the first and after the last byte with one."""
    first_BP1: torch.Tensor
    """The first byte of each patch, and where the last ends, int32 [B, P + 1]."""


def patch_runs(patch_BS: torch.Tensor, n_patches: int) -> PatchRuns:
    """Find the runs of bytes that share a patch, from integer [B, S]."""
    return PatchRuns(patch_BS.int(), first_of_patches(patch_BS, n_patches))


class CrossAttention(nn.Module):
    """Normed queries and keys, full projections, no biases, no positions; the two forwards differ in who asks.

    The result includes the inner residual, `queries + attention`; the caller adds its own residual on top, which
    doubles it. The released weights were trained that way (see `encoder.py`).
    """

    def __init__(self, dim: int, n_heads: int, slots_per_patch: int):
        super().__init__()
        self.n_heads = n_heads
        self.slots_per_patch = slots_per_patch
        self.q_norm = RMSNorm(dim, eps=NORM_EPS)
        self.kv_norm = RMSNorm(dim, eps=NORM_EPS)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, -1))


class KeysValues(NamedTuple):
    """Keys and values of patches: all that bytes which read them need."""

    k_BPNd: torch.Tensor
    v_BPNd: torch.Tensor


class PatchesReadBytes(CrossAttention):
    """The encoder's direction: the k slots of a patch attend over the bytes of that patch."""

    def forward(self, patch_BPNd: torch.Tensor, byte_BSd: torch.Tensor, runs: PatchRuns) -> torch.Tensor:
        """Attend; the softmax runs over the bytes that share a patch.

        Args:
            patch_BPNd: slots of each patch [B, P, k, d].
            byte_BSd: encoder states [B, S, d].
            runs: the bytes that each patch holds.

        Returns:
            patch + attention, [B, P, k, d].
        """
        normed_BSd = self.kv_norm(byte_BSd)
        q_BPNHK = self._heads(self.wq(self.q_norm(patch_BPNd)))
        k_BSHK, v_BSHK = self._heads(self.wk(normed_BSd)), self._heads(self.wv(normed_BSd))
        out = segment_attention(q_BPNHK, k_BSHK, v_BSHK, runs.first_BP1)
        return patch_BPNd + self.wo(out.flatten(3))


class BytesReadPatches(CrossAttention):
    """The decoder's direction: a byte attends over the k slots of its source patch."""

    def forward(self, byte_BSd: torch.Tensor, patches: torch.Tensor | KeysValues, sources: PatchRuns) -> torch.Tensor:
        """Attend over the k slots of the patch that each byte reads.

        Args:
            byte_BSd: decoder states [B, S, d].
            patches: slots of each patch [B, P, k, d], or what `keys_values` has made of them.
            sources: the bytes that read each patch.

        Returns:
            byte + attention, [B, S, d].
        """
        k_BPNd, v_BPNd = patches if isinstance(patches, KeysValues) else self.keys_values(patches)
        q_BSHK = self._heads(self.wq(self.q_norm(byte_BSd)))
        k_BPNHK, v_BPNHK = self._heads(k_BPNd), self._heads(v_BPNd)
        out = gather_attention(q_BSHK, k_BPNHK, v_BPNHK, sources.patch_BS, sources.first_BP1)
        return byte_BSd + self.wo(out.flatten(2))

    def keys_values(self, patch_BPNd: torch.Tensor) -> KeysValues:
        """Project the slots of patches [B, P, k, d], for bytes that read them one after another."""
        normed = self.kv_norm(patch_BPNd)
        return KeysValues(self.wk(normed), self.wv(normed))
