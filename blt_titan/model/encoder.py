"""The local encoder: bytes in, byte states and patch states out (paper, section 3.2).

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), G global width, X = k * d.
"""

from typing import cast

import torch
import torch.nn as nn

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.attention import AttentionMask
from blt_titan.model.cross_attention import PatchesReadBytes, max_bytes
from blt_titan.model.layers import Rotation, block_stack
from blt_titan.model.sizes import BLTArgs


class LocalEncoder(nn.Module):
    """Windowed blocks over bytes, then patches pool and read their own bytes."""

    def __init__(self, args: BLTArgs):
        super().__init__()
        self.slots_per_patch = args.cross_attn_k
        self.tok_embeddings = nn.Embedding(VOCAB_SIZE, args.local_dim)
        self.layers = block_stack(args.encoder_layers, args.local_dim, args.local_heads, args.local_ffn_hidden)
        self.patch_projection = nn.Linear(args.local_dim, args.patch_dim, bias=False)
        n_cross = args.encoder_layers if args.encoder_cross_attn_all_layers else 1
        self.cross_attention = nn.ModuleList(
            PatchesReadBytes(args.local_dim, args.cross_attn_heads, args.cross_attn_k) for _ in range(n_cross)
        )
        # Only where the k slots side by side are not already as wide as the global transformer.
        self.global_projection = (
            nn.Linear(args.patch_dim, args.global_dim, bias=False) if args.patch_dim != args.global_dim else None
        )

    def forward(
        self,
        token_ids_BS: torch.Tensor,
        hash_embedding_BSd: torch.Tensor,
        byte_patch_BS: torch.Tensor,
        n_patches: int,
        rotation: Rotation,
        mask: AttentionMask,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode rows of bytes.

        Args:
            token_ids_BS: ids, integer [B, S].
            hash_embedding_BSd: summed n-gram embeddings [B, S, d].
            byte_patch_BS: the patch that holds each byte, integer [B, S], negative for none.
            n_patches: P.
            rotation: RoPE of the byte positions.
            mask: window mask of the row.

        Returns:
            Byte states [B, S, d] (not normed) and patch states [B, P, G].
        """
        # Bytes that belong to no patch go to slot P, which the pooling drops.
        patch_BS = torch.where(byte_patch_BS < 0, n_patches, byte_patch_BS).long()
        h_BSd = self.tok_embeddings(token_ids_BS) + hash_embedding_BSd
        p_BPX = None
        for i, block in enumerate(self.layers.values()):
            h_BSd = block(h_BSd, rotation, mask)
            p_BPX = self.read_bytes(i, p_BPX, h_BSd, patch_BS, n_patches)
        assert p_BPX is not None
        return h_BSd, self.to_global(p_BPX)

    def read_bytes(
        self, layer: int, p_BPX: torch.Tensor | None, h_BSd: torch.Tensor, patch_BS: torch.Tensor, n_patches: int
    ) -> torch.Tensor | None:
        """Let patches read the bytes after a layer, if they do there; before the first time they pool them.

        Args:
            layer: the layer that gave `h_BSd`.
            p_BPX: what patches read so far [B, P, k * d]; None before the first time.
            h_BSd: byte states [B, S, d].
            patch_BS: the patch that holds each byte, int64 [B, S], P for none.
            n_patches: P.
        """
        number = layer - (len(self.layers) - len(self.cross_attention))
        if number < 0:
            return None
        if p_BPX is None:
            pooled_BPd = max_bytes(h_BSd, patch_BS, n_patches + 1)[:, :n_patches]
            p_BPX = cast(torch.Tensor, self.patch_projection(pooled_BPd))
        slots_BPNd = p_BPX.unflatten(-1, (self.slots_per_patch, -1))
        # CrossAttention already added its queries: the residual is doubled, as the released weights expect.
        return p_BPX + self.cross_attention[number](slots_BPNd, h_BSd, patch_BS).flatten(2)

    def to_global(self, p_BPX: torch.Tensor) -> torch.Tensor:
        """Bring patches to the width of the global transformer: [B, P, k * d] -> [B, P, G]."""
        return p_BPX if self.global_projection is None else self.global_projection(p_BPX)
