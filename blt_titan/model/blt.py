"""The Byte Latent Transformer (arXiv 2412.09871): bytes -> patches -> global transformer -> bytes.

    ids  --embed + hash n-grams-->  local encoder  --pool, cross-attend-->  patches
                                         |                                     |
                                         |                              global transformer
                                         v                                     |
    logits  <--  local decoder  <--  byte states  +  source patch  <-----------+

The local stacks are narrow and see a window of bytes; the global transformer is wide and runs once per patch, which
is where the compute goes. Where patches begin is decided outside the model and arrives as indices (`batch.py`), so a
forward never asks the host for a number.

Single-device code: how it is split over devices lives in `parallelisms`, which finds `hash_embedding`, `encoder`,
`layers` (the global blocks) and `decoder` by these names. What the model offers for that: it can be cut between global
blocks (a part that is None is another stage's), and a device may hold one slice of each row (`batch.SliceLayout`), then
with `split` saying which, and `last_patch_before` and `Attention.attend` fetching what lies on other devices.

Letters: B rows, S byte slots, P patch slots, d local width, G global width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from blt_titan.batch import RowSplit
from blt_titan.model.attention import AttentionMask, SlicedMask, causal_mask, window_mask
from blt_titan.model.decoder import LocalDecoder
from blt_titan.model.encoder import LocalEncoder
from blt_titan.model.hash_embedding import HashEmbedding
from blt_titan.model.initialization import ColumnsHere, WriteParameter, all_columns, initialize, write_whole
from blt_titan.model.layers import Rotation, block_stack, rotary_angles
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
        self.split = RowSplit()
        self.last_patch_before: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self.write_parameter: WriteParameter = write_whole
        self.columns_here: ColumnsHere = all_columns

    def forward(
        self,
        inputs: torch.Tensor,
        h_BSd: torch.Tensor | None = None,
        *,
        byte_pos_BS: torch.Tensor,
        byte_doc_BS: torch.Tensor,
        byte_patch_BS: torch.Tensor,
        source_patch_BS: torch.Tensor,
        patch_pos_BP: torch.Tensor,
        patch_doc_BP: torch.Tensor,
        **slice_layout: torch.Tensor,
    ) -> Any:
        """Score the next byte at every slot; the indices are those of `batch.PatchLayout`.

        `inputs` are token ids, integer [B, S]; in a part without encoder the patch states [B, P, G] of the part before,
        with its byte states `h_BSd`. `slice_layout` are the fields of `batch.SliceLayout`, where a device holds one
        slice of each row.

        Returns:
            Logits, fp32 [B, S, V]; at padded slots they are finite and mean nothing. A part without decoder returns
            patch states and byte states.
        """
        args, split = self.args, self.split
        byte_context: tuple[Any, ...] = ()
        if self.encoder is not None or self.decoder is not None:
            byte_context = self._byte_context(byte_pos_BS, byte_doc_BS, slice_layout)
        if self.encoder is None:
            p_BPG = inputs
        else:
            hashed_BSd = self.hash_embedding(
                inputs, byte_doc_BS, slice_layout.get("before_ids_BR"), slice_layout.get("before_doc_BR")
            )
            n_patches = patch_pos_BP.shape[1] // split.slices
            h_BSd, p_BPG = self.encoder(inputs, hashed_BSd, byte_patch_BS, n_patches, *byte_context)
        if len(self.layers):
            n_queries = patch_pos_BP.shape[1] // split.query_parts
            queries = range(split.query_part * n_queries, (split.query_part + 1) * n_queries)
            patch_mask = causal_mask(patch_doc_BP, backend=args.attention_backend, queries=queries)
            patch_pos_BQ = patch_pos_BP[:, queries.start : queries.stop]
            patch_rotation = rotary_angles(patch_pos_BQ, head_dim=args.global_head_dim, theta=args.rope_theta)
            for block in self.layers.values():
                p_BPG = block(p_BPG, patch_rotation, patch_mask)
        if self.decoder is None:
            return p_BPG, h_BSd
        before_B1G = None
        if self.last_patch_before is not None:
            before_B1G = self.last_patch_before(p_BPG, slice_layout["last_patch_B1"])
        return self.decoder(h_BSd, p_BPG, source_patch_BS, *byte_context, before_B1G)

    def _byte_context(
        self, byte_pos_BS: torch.Tensor, byte_doc_BS: torch.Tensor, slice_layout: dict[str, torch.Tensor]
    ) -> tuple[Rotation, AttentionMask]:
        args = self.args
        rotation = rotary_angles(byte_pos_BS, head_dim=args.local_head_dim, theta=args.rope_theta)
        if not slice_layout:
            return rotation, window_mask(byte_doc_BS, window=args.local_window, backend=args.attention_backend)
        before_doc_BR = slice_layout["before_doc_BR"]
        before_doc_BW = before_doc_BR[:, before_doc_BR.shape[1] - (args.local_window - 1) :]
        mask = window_mask(
            byte_doc_BS, window=args.local_window, backend=args.attention_backend, before_doc_BW=before_doc_BW
        )
        return rotation, SlicedMask(mask, slice_layout["tail_BT"], slice_layout["halo_BW"])

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
            columns_here=self.columns_here,
        )
