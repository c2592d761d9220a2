"""The local decoder: byte states and global patch states in, logits over the next byte out (paper, section 3.3).

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), G global width,
V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn as nn

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.args import BLTArgs
from blt_titan.model.attention import AttentionMask
from blt_titan.model.cross_attention import BytesReadPatches, KeysValues, PatchRuns, patch_runs
from blt_titan.model.eager import RMSNorm
from blt_titan.model.layers import NORM_EPS, Attend, Rotation, block_stack


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
        self.norm = RMSNorm(args.local_dim, eps=NORM_EPS)
        self.output = nn.Linear(args.local_dim, VOCAB_SIZE, bias=False)

    def forward(
        self,
        h_BSd: torch.Tensor,
        p_BPG: torch.Tensor,
        source_patch_BS: torch.Tensor,
        rotation: Rotation,
        mask: AttentionMask,
        attends: Sequence[Attend],
        before_B1G: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode rows of bytes.

        Args:
            h_BSd: byte states of the encoder [B, S, d].
            p_BPG: patch states of the global transformer [B, P, G] (not normed).
            source_patch_BS: the patch each byte reads, integer [B, S], negative for none.
            rotation: RoPE of the byte positions.
            mask: window mask of the row.
            attends: attention of each layer.
            before_B1G: state of the last patch before the first; bytes that read it have P as their source.

        Returns:
            Logits, fp32 [B, S, V].
        """
        if before_B1G is not None:
            # It comes first, so that the bytes which read a patch stay side by side.
            n_patches = p_BPG.shape[1]
            p_BPG = torch.cat([before_B1G, p_BPG], dim=1)
            after_BS = source_patch_BS + (source_patch_BS >= 0)
            source_patch_BS = torch.where(source_patch_BS == n_patches, 0, after_BS)
        patches = [self.patch_slots(p_BPG)] * len(self.cross_attention)
        sources = patch_runs(source_patch_BS, p_BPG.shape[1])
        return self.read_and_decode(h_BSd, patches, sources, rotation, mask, attends)

    def patch_slots(self, p_BPG: torch.Tensor) -> torch.Tensor:
        """Cut patch states into what bytes read: [B, P, G] -> [B, P, k, d]."""
        return self.patch_projection(p_BPG).unflatten(-1, (self.slots_per_patch, -1))

    def keys_values(self, p_BPG: torch.Tensor) -> list[KeysValues]:
        """Project patch states for each layer that reads them."""
        slots_BPNd, readers = self.patch_slots(p_BPG), cast(Iterable[BytesReadPatches], self.cross_attention)
        return [cross_attention.keys_values(slots_BPNd) for cross_attention in readers]

    def read_and_decode(
        self,
        h_BSd: torch.Tensor,
        patches: Sequence[torch.Tensor | KeysValues],
        sources: PatchRuns,
        rotation: Rotation,
        mask: AttentionMask,
        attends: Sequence[Attend],
    ) -> torch.Tensor:
        """Decode bytes that read these patches.

        Args:
            h_BSd: as in `forward`.
            patches: for each layer that reads them, `patch_slots` or `keys_values`.
            sources: the bytes that read each patch.
            rotation: as in `forward`.
            mask: as in `forward`.
            attends: as in `forward`.

        Returns:
            Logits, fp32 [B, S, V].
        """
        for i, (block, attend) in enumerate(zip(self.layers.values(), attends, strict=True)):
            if i < len(self.cross_attention):
                # CrossAttention already added its queries: the residual is doubled here too.
                h_BSd = h_BSd + self.cross_attention[i](h_BSd, patches[i], sources)
            h_BSd = block(h_BSd, rotation, mask, attend)
        return self.output(self.norm(h_BSd)).float()
