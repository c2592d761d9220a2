"""The Byte Latent Transformer (arXiv 2412.09871): bytes -> patches -> global transformer -> bytes.

    ids  --embed + hash n-grams-->  local encoder  --pool, cross-attend-->  patches
                                         |                                     |
                                         |                              global transformer
                                         v                                     |
    logits  <--  local decoder  <--  byte states  +  source patch  <-----------+

The local stacks are narrow and see a window of bytes; the global transformer is wide and runs once per patch, which
is where the compute goes. Where patches begin is decided outside the model and arrives as indices (`batch.py`), so a
forward never asks the host for a number. Single-device code: how it is split over devices lives in `parallelisms`,
which finds `hash_embedding`, `encoder`, `layers` (the global blocks) and `decoder` by these names.

Letters: B rows, S byte slots, P patch slots, d local width, G global width, V vocabulary.
"""

import torch
import torch.nn as nn

from blt_titan.model.attention import causal_mask, window_mask
from blt_titan.model.decoder import LocalDecoder
from blt_titan.model.encoder import LocalEncoder
from blt_titan.model.hash_embedding import HashEmbedding
from blt_titan.model.initialization import WriteParameter, initialize, write_whole
from blt_titan.model.layers import block_stack, rotary_angles
from blt_titan.model.layout import layout_from_patch_lengths
from blt_titan.model.sizes import BLTArgs


class BLT(nn.Module):
    """A BLT without its patcher. Safe to build on the meta device; `init_weights` then sets everything."""

    def __init__(self, args: BLTArgs):
        super().__init__()
        args.validate()
        self.args = args
        self.hash_embedding = HashEmbedding(
            args.local_dim, ngrams=args.hash_ngrams, n_functions=args.hash_functions, n_rows=args.hash_rows
        )
        self.encoder = LocalEncoder(args)
        self.layers = block_stack(args.global_layers, args.global_dim, args.global_heads, args.global_ffn_hidden)
        self.decoder = LocalDecoder(args)
        self.write_parameter: WriteParameter = write_whole

    def forward(
        self,
        token_ids_BS: torch.Tensor,
        *,
        byte_pos_BS: torch.Tensor,
        byte_doc_BS: torch.Tensor,
        byte_patch_BS: torch.Tensor,
        source_patch_BS: torch.Tensor,
        patch_pos_BP: torch.Tensor,
        patch_doc_BP: torch.Tensor,
    ) -> torch.Tensor:
        """Score the next byte at every slot; the indices are those of `batch.PatchLayout`.

        Returns:
            Logits, fp32 [B, S, V]. At padded slots they are finite and mean nothing.
        """
        args = self.args
        byte_rotation = rotary_angles(byte_pos_BS, head_dim=args.local_head_dim, theta=args.rope_theta)
        byte_mask = window_mask(byte_doc_BS, window=args.local_window, backend=args.attention_backend)
        patch_rotation = rotary_angles(patch_pos_BP, head_dim=args.global_head_dim, theta=args.rope_theta)
        patch_mask = causal_mask(patch_doc_BP, backend=args.attention_backend)

        hashed_BSd = self.hash_embedding(token_ids_BS, byte_doc_BS)
        h_BSd, p_BPG = self.encoder(
            token_ids_BS, hashed_BSd, byte_patch_BS, patch_pos_BP.shape[1], byte_rotation, byte_mask
        )
        for block in self.layers.values():
            p_BPG = block(p_BPG, patch_rotation, patch_mask)
        return self.decoder(h_BSd, p_BPG, source_patch_BS, byte_rotation, byte_mask)

    def logits(self, token_ids_BS: torch.Tensor, patch_lengths_BP: torch.Tensor) -> torch.Tensor:
        """Score full rows whose patches are given as lengths, as in `transformers`.

        Args:
            token_ids_BS: ids, integer [B, S], no padding; a new document begins after each EOS.
            patch_lengths_BP: integer [B, P], each row `[1, ...]`, sum S + 1, right-padded with 0.

        Returns:
            Logits, fp32 [B, S, V].

        Raises:
            ValueError: if the lengths are not of that form.
        """
        layout = layout_from_patch_lengths(token_ids_BS, patch_lengths_BP)
        return self(token_ids_BS, **layout.as_dict())

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw every parameter from the run's seed and its name. There are no buffers, hence no buffer device."""
        initialize(
            self,
            seed=self.args.init_seed,
            depth_scaling=self.args.init_depth_scaling,
            stack_depths={
                "encoder.layers": self.args.encoder_layers,
                "layers": self.args.global_layers,
                "decoder.layers": self.args.decoder_layers,
            },
            write=self.write_parameter,
        )
