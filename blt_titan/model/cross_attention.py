"""Cross-attention between bytes and patches, by index: no [P * k, S] mask is ever built.

Every byte lies in one patch and reads one patch, so visibility is a relation between a byte and an index:

    encoder: the k queries of a patch see that patch's bytes  -> softmax over the bytes that share an index
    decoder: a byte sees the k slots of its source patch      -> gather those k slots, softmax over k

At 16 rows of 24,576 bytes a dense mask would hold 81 GiB; this holds k scores per byte and head. A query with
nothing to see (an empty patch, a padded byte) yields exactly 0, with finite gradients.

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), H heads, K head size.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from blt_titan.model.eager import RMSNorm
from blt_titan.model.layers import NORM_EPS


def gather_patches(patch_BPX: torch.Tensor, index_BS: torch.Tensor) -> torch.Tensor:
    """Read one patch's features for each byte: [B, P, X], index [B, S] >= 0 -> [B, S, X]."""
    B, P, X = patch_BPX.shape
    row_B1 = torch.arange(B, device=index_BS.device)[:, None] * P
    # An embedding look-up is the row gather whose backward is a sorted sum on every device.
    return F.embedding(index_BS + row_B1, patch_BPX.reshape(B * P, X))


def sum_bytes(byte_BSX: torch.Tensor, index_BS: torch.Tensor, n_patches: int) -> torch.Tensor:
    """Add up the features of the bytes of each patch: [B, S, X], index [B, S] >= 0 -> [B, P, X]."""
    B, S, X = byte_BSX.shape
    row_B1 = torch.arange(B, device=index_BS.device)[:, None] * n_patches
    total = byte_BSX.new_zeros(B * n_patches, X)
    return total.index_add(0, (index_BS + row_B1).flatten(), byte_BSX.reshape(B * S, X)).view(B, n_patches, X)


def max_bytes(byte_BSX: torch.Tensor, index_BS: torch.Tensor, n_patches: int) -> torch.Tensor:
    """Take the maximum over the bytes of each patch, 0 where it has none: [B, S, X] -> [B, P, X]."""
    index_BSX = index_BS[..., None].expand_as(byte_BSX)
    empty = byte_BSX.new_zeros(byte_BSX.shape[0], n_patches, byte_BSX.shape[2])
    return empty.scatter_reduce(1, index_BSX, byte_BSX, "amax", include_self=False)


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


class KeysValues(NamedTuple):
    """Keys and values of patches: all that bytes which read them need."""

    k_BPNd: torch.Tensor
    v_BPNd: torch.Tensor


class PatchesReadBytes(CrossAttention):
    """The encoder's direction: the k slots of a patch attend over the bytes of that patch."""

    def forward(self, patch_BPNd: torch.Tensor, byte_BSd: torch.Tensor, byte_patch_BS: torch.Tensor) -> torch.Tensor:
        """Attend; the softmax runs over the bytes that share a patch index.

        Args:
            patch_BPNd: slots of each patch [B, P, k, d].
            byte_BSd: encoder states [B, S, d].
            byte_patch_BS: the byte's patch, int64 [B, S]; P for bytes that belong to none.

        Returns:
            patch + attention, [B, P, k, d].
        """
        P, N, d = patch_BPNd.shape[1:]
        H, K = self.n_heads, d // self.n_heads
        normed_BSd = self.kv_norm(byte_BSd)
        q_BPNd, k_BSd, v_BSd = self.wq(self.q_norm(patch_BPNd)), self.wk(normed_BSd), self.wv(normed_BSd)
        # One more patch receives the bytes that belong to none; it is dropped at the end.
        q_BSNHK = gather_patches(F.pad(q_BPNd.flatten(2), (0, 0, 0, 1)), byte_patch_BS).unflatten(-1, (N, H, K))
        k_BSHK, v_BSHK = (x.unflatten(-1, (H, K)) for x in (k_BSd, v_BSd))
        score_BSX = ((q_BSNHK * k_BSHK[:, :, None]).sum(-1, dtype=torch.float32) * K**-0.5).flatten(2)
        with torch.no_grad():
            peak_BSX = gather_patches(max_bytes(score_BSX, byte_patch_BS, P + 1), byte_patch_BS)
        weight_BSX = (score_BSX - peak_BSX).exp()
        total_BPX = sum_bytes(weight_BSX, byte_patch_BS, P + 1)[:, :P]
        weighted_BSX = (weight_BSX.unflatten(-1, (N, H))[..., None] * v_BSHK[:, :, None]).flatten(2)
        mixed_BPX = sum_bytes(weighted_BSX, byte_patch_BS, P + 1)[:, :P]
        # An empty patch has total 0 and mixed 0; dividing by 1 there keeps value and gradient at 0.
        safe_BPX = torch.where(total_BPX > 0, total_BPX, 1.0)
        out_BPNd = (mixed_BPX.unflatten(-1, (N, H, K)) / safe_BPX.unflatten(-1, (N, H))[..., None]).flatten(3)
        return patch_BPNd + self.wo(out_BPNd.type_as(q_BPNd))


class BytesReadPatches(CrossAttention):
    """The decoder's direction: a byte attends over the k slots of its source patch."""

    def forward(
        self, byte_BSd: torch.Tensor, patches: torch.Tensor | KeysValues, source_patch_BS: torch.Tensor
    ) -> torch.Tensor:
        """Attend over k gathered slots.

        Args:
            byte_BSd: decoder states [B, S, d].
            patches: slots of each patch [B, P, k, d], or what `keys_values` has made of them.
            source_patch_BS: the patch that the byte reads, int64 [B, S]; negative for none.

        Returns:
            byte + attention, [B, S, d].
        """
        k_BPNd, v_BPNd = patches if isinstance(patches, KeysValues) else self.keys_values(patches)
        N, d = k_BPNd.shape[2:]
        H, K = self.n_heads, d // self.n_heads
        index_BS = source_patch_BS.clamp(min=0)
        k_BSNHK = gather_patches(k_BPNd.flatten(2), index_BS).unflatten(-1, (N, H, K))
        v_BSNHK = gather_patches(v_BPNd.flatten(2), index_BS).unflatten(-1, (N, H, K))
        q_BSHK = self.wq(self.q_norm(byte_BSd)).unflatten(-1, (H, K))
        score_BSNH = (q_BSHK[:, :, None] * k_BSNHK).sum(-1, dtype=torch.float32) * K**-0.5
        reads_BS11 = (source_patch_BS >= 0)[..., None, None]
        weight_BSNH = (score_BSNH.softmax(dim=2) * reads_BS11).type_as(v_BSNHK)
        out_BSd = (weight_BSNH[..., None] * v_BSNHK).sum(2).flatten(2)
        return byte_BSd + self.wo(out_BSd)

    def keys_values(self, patch_BPNd: torch.Tensor) -> KeysValues:
        """Project the slots of patches [B, P, k, d], for bytes that read them one after another."""
        normed = self.kv_norm(patch_BPNd)
        return KeysValues(self.wk(normed), self.wv(normed))
