"""The local encoder: bytes in, byte states and patch states out (paper, section 3.2).

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), G global width, X = k * d.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import NamedTuple

import torch
import torch.nn as nn

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.args import BLTArgs
from blt_titan.model.attention import AttentionMask
from blt_titan.model.cross_attention import PatchesReadBytes, PatchRuns, patch_runs
from blt_titan.model.kernels.segment_max import segment_max
from blt_titan.model.layers import Attend, Rotation, block_stack


class EncoderStates(NamedTuple):
    """What the encoder gives."""

    byte_states: tuple[torch.Tensor, ...]
    """[B, S, d] each (not normed), after each layer where patches read them; the last are what the decoder takes."""
    p_BPG: torch.Tensor
    """Patch states, as wide as the global transformer."""


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
        ids_BS: torch.Tensor,
        hash_embedding_BSd: torch.Tensor,
        byte_patch_BS: torch.Tensor,
        n_patches: int,
        rotation: Rotation,
        mask: AttentionMask,
        attends: Sequence[Attend],
    ) -> EncoderStates:
        """Encode rows of bytes.

        Args:
            ids_BS: ids, integer [B, S].
            hash_embedding_BSd: summed n-gram embeddings [B, S, d].
            byte_patch_BS: the patch that holds each byte, integer [B, S], negative for none.
            n_patches: P.
            rotation: RoPE of the byte positions.
            mask: window mask of the row.
            attends: attention of each layer.
        """
        runs = patch_runs(byte_patch_BS, n_patches)
        # Layer by layer: patches read the bytes before the next layer is run.
        read, kept = tee(self.byte_states(ids_BS, hash_embedding_BSd, rotation, mask, attends))
        p_BPG = self.patch_states(read, runs)
        return EncoderStates(tuple(kept), p_BPG)

    def byte_states(
        self,
        ids_BS: torch.Tensor,
        hash_embedding_BSd: torch.Tensor,
        rotation: Rotation,
        mask: AttentionMask,
        attends: Sequence[Attend],
    ) -> Iterator[torch.Tensor]:
        """Run the layers; yield byte states [B, S, d] after each where patches read them. Arguments as in `forward`."""
        h_BSd = self.tok_embeddings(ids_BS) + hash_embedding_BSd
        first_read = len(self.layers) - len(self.cross_attention)
        for i, (block, attend) in enumerate(zip(self.layers.values(), attends, strict=True)):
            h_BSd = block(h_BSd, rotation, mask, attend)
            if i >= first_read:
                yield h_BSd

    def patch_states(self, states: Iterable[torch.Tensor], runs: PatchRuns) -> torch.Tensor:
        """Pool the bytes of each patch, then let it read them.

        Args:
            states: what `byte_states` yields, or the same of some of the bytes.
            runs: the bytes that each patch holds.

        Returns:
            Patch states, [B, P, G].
        """
        p_BPX = None
        for cross_attention, h_BSd in zip(self.cross_attention, states, strict=True):
            if p_BPX is None:
                p_BPX = self.patch_projection(segment_max(h_BSd, runs.first_BP1))
            slots_BPNd = p_BPX.unflatten(-1, (self.slots_per_patch, -1))
            # CrossAttention already added its queries: the residual is doubled, as the released weights expect.
            p_BPX = p_BPX + cross_attention(slots_BPNd, h_BSd, runs).flatten(2)
        assert p_BPX is not None
        return p_BPX if self.global_projection is None else self.global_projection(p_BPX)
