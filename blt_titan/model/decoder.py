"""The local decoder: byte states and global patch states in, logits over the next byte out (paper, section 3.3).

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), G global width,
V vocabulary.
"""

import torch
import torch.nn as nn

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.attention import AttentionMask
from blt_titan.model.cross_attention import BytesReadPatches
from blt_titan.model.layers import NORM_EPS, Rotation, block_stack
from blt_titan.model.sizes import BLTArgs


class LocalDecoder(nn.Module):
    """Bytes read their source patch before every block (option: before the first only)."""

    def __init__(self, args: BLTArgs):
        super().__init__()
        self.slots_per_patch = args.cross_attn_k
        self.patch_projection = nn.Linear(args.global_dim, args.patch_dim, bias=False)
        n_cross = args.decoder_layers if args.decoder_cross_attn_all_layers else 1
        self.cross_attention = nn.ModuleList(
            BytesReadPatches(args.local_dim, args.cross_attn_heads, args.cross_attn_k) for _ in range(n_cross)
        )
        self.layers = block_stack(args.decoder_layers, args.local_dim, args.local_heads, args.local_ffn_hidden)
        self.norm = nn.RMSNorm(args.local_dim, eps=NORM_EPS)
        self.output = nn.Linear(args.local_dim, VOCAB_SIZE, bias=False)

    def forward(
        self,
        h_BSd: torch.Tensor,
        p_BPG: torch.Tensor,
        source_patch_BS: torch.Tensor,
        rotation: Rotation,
        mask: AttentionMask,
        before_B1G: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode rows of bytes.

        Args:
            h_BSd: byte states of the encoder [B, S, d].
            p_BPG: patch states of the global transformer [B, P, G] (not normed).
            source_patch_BS: the patch each byte reads, integer [B, S], negative for none.
            rotation: RoPE of the byte positions.
            mask: window mask of the row.
            before_B1G: state of the last patch before the first; bytes that read it have P as their source.

        Returns:
            Logits, fp32 [B, S, V].
        """
        source_BS = source_patch_BS.long()
        if before_B1G is not None:
            p_BPG = torch.cat([p_BPG, before_B1G], dim=1)
        patch_BPNd = self.patch_projection(p_BPG).unflatten(-1, (self.slots_per_patch, -1))
        for i, block in enumerate(self.layers.values()):
            if i < len(self.cross_attention):
                # CrossAttention already added its queries: the residual is doubled here too.
                h_BSd = h_BSd + self.cross_attention[i](h_BSd, patch_BPNd, source_BS)
            h_BSd = block(h_BSd, rotation, mask)
        return self.output(self.norm(h_BSd)).float()
