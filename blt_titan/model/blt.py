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
blocks (`BLTStage`), and what a device does otherwise than one alone would, because it holds
one slice of each row (`batch.SliceLayout`) or of a weight, is in its `placement`.

Letters: B rows, S byte slots, P patch slots, d local width, G global width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from blt_titan.batch import PADDING, PatchLayout, SliceLayout
from blt_titan.model.args import BLTArgs
from blt_titan.model.attention import AttentionMask, SlicedMask, causal_mask, window_mask
from blt_titan.model.decoder import LocalDecoder
from blt_titan.model.encoder import EncoderStates, LocalEncoder
from blt_titan.model.hash_embedding import HashEmbedding
from blt_titan.model.initialization import initialize
from blt_titan.model.layers import Attend, Rotation, block_stack, rotary_angles, run_blocks
from blt_titan.model.patch_lengths import layout_from_patch_lengths
from blt_titan.model.placement import Placement


class StackAttends(NamedTuple):
    """Attention of each layer of the three stacks, where it takes keys and values from elsewhere too."""

    encoder: Sequence[Attend]
    patches: Sequence[Attend]
    decoder: Sequence[Attend]


class BLTStates(NamedTuple):
    """What a forward computes on its way."""

    byte_states: tuple[torch.Tensor, ...]
    """As in `EncoderStates`."""
    p_BPG: torch.Tensor
    """Patch states after the global transformer (not normed)."""
    logits_BSV: torch.Tensor
    """fp32; at padded slots they are finite and mean nothing."""


_ByteContext = tuple[Rotation, AttentionMask]
"""What encoder and decoder share: rotation of the bytes' positions, and what each byte may see."""


class _Parts(nn.Module):
    """What a BLT and its pipeline stages share: how each part is run, where it lives, and its initial weights."""

    layers: nn.ModuleDict

    def __init__(self, args: BLTArgs):
        super().__init__()
        self.args = args
        self.placement = Placement()

    def _encode(
        self,
        hash_embedding: HashEmbedding,
        encoder: LocalEncoder,
        ids_BS: torch.Tensor,
        layout: PatchLayout,
        context: _ByteContext,
        attends: Sequence[Attend] | None = None,
    ) -> EncoderStates:
        placement = self.placement
        before = layout.slice[:2] if isinstance(layout.slice, SliceLayout) else (None, None)
        hashed_BSd = hash_embedding(ids_BS, layout.byte_doc_BS, *before, placement.look_up)
        n_patches = layout.patch_pos_BP.shape[1] // placement.split.slices
        attends = attends or [placement.attend_bytes] * len(encoder.layers)
        return encoder(ids_BS, hashed_BSd, layout.byte_patch_BS, n_patches, *context, attends)

    def _run_patches(
        self, p_BPG: torch.Tensor, layout: PatchLayout, attends: Sequence[Attend] | None = None
    ) -> torch.Tensor:
        if not len(self.layers):
            return p_BPG
        args, split = self.args, self.placement.split
        n_queries = layout.patch_pos_BP.shape[1] // split.query_parts
        queries = range(split.query_part * n_queries, (split.query_part + 1) * n_queries)
        mask = causal_mask(
            layout.patch_doc_BP,
            backend=args.attention_backend,
            queries=queries,
            documents=args.varlen_documents,
        )
        patch_pos_BQ = layout.patch_pos_BP[:, queries.start : queries.stop]
        rotation = rotary_angles(patch_pos_BQ, head_dim=args.global_head_dim, theta=args.rope_theta)
        attends = attends or [self.placement.attend_patches] * len(self.layers)
        return run_blocks(self.layers, p_BPG, rotation, mask, attends)

    def _decode(
        self,
        decoder: LocalDecoder,
        h_BSd: torch.Tensor,
        p_BPG: torch.Tensor,
        layout: PatchLayout,
        context: _ByteContext,
        attends: Sequence[Attend] | None = None,
    ) -> torch.Tensor:
        placement = self.placement
        before_B1G = None
        if placement.last_patch_before is not None:
            assert isinstance(layout.slice, SliceLayout)
            before_B1G = placement.last_patch_before(p_BPG, layout.slice.last_patch_B1)
        attends = attends or [placement.attend_bytes] * len(decoder.layers)
        return decoder(h_BSd, p_BPG, layout.source_patch_BS, *context, attends, before_B1G)

    def _byte_context(self, layout: PatchLayout) -> _ByteContext:
        """Prepare the local stacks."""
        args = self.args
        rotation = rotary_angles(layout.byte_pos_BS, head_dim=args.local_head_dim, theta=args.rope_theta)
        sliced = layout.slice
        if not isinstance(sliced, SliceLayout):
            mask = window_mask(
                layout.byte_doc_BS,
                window=args.local_window,
                backend=args.attention_backend,
                documents=args.varlen_documents,
            )
            return rotation, mask
        # One more, which nobody sees: W keys lie aligned in memory.
        reach = args.local_window - 1
        before_doc_BW = F.pad(sliced.before_doc_BR[:, sliced.before_doc_BR.shape[1] - reach :], (1, 0), value=PADDING)
        halo_BW = F.pad(sliced.halo_BW, (1, 0), value=PADDING)
        mask = window_mask(
            layout.byte_doc_BS, window=args.local_window, backend=args.attention_backend, before_doc_BW=before_doc_BW
        )
        return rotation, SlicedMask(mask, sliced.tail_BT, halo_BW)

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
            write=self.placement.write_parameter,
            local_columns=self.placement.local_columns,
        )


class BLT(_Parts):
    """A BLT without its patcher. Safe to build on the meta device; `init_weights` then sets everything."""

    def __init__(self, args: BLTArgs):
        args.validate()
        super().__init__(args)
        self.hash_embedding = HashEmbedding(
            args.local_dim, ngrams=args.hash_ngrams, n_functions=args.hash_functions, n_rows=args.hash_rows
        )
        self.encoder = LocalEncoder(args)
        self.layers = block_stack(args.global_layers, args.global_dim, args.global_heads, args.global_ffn_hidden)
        self.decoder = LocalDecoder(args)

    def forward(self, ids_BS: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """Score the next byte at every slot.

        Args:
            ids_BS: token ids, integer [B, S].
            layout: of the rows, with its slice where this device holds one slice of each.

        Returns:
            Logits, fp32 [B, S, V]; at padded slots they are finite and mean nothing.
        """
        return self.run(ids_BS, layout).logits_BSV

    def run(self, ids_BS: torch.Tensor, layout: PatchLayout, attends: StackAttends | None = None) -> BLTStates:
        """Score the next byte at every slot, and return what is computed on the way.

        Args:
            ids_BS: token ids, integer [B, S].
            layout: of the rows.
            attends: attention of each layer; None for the placement's.
        """
        encoder_attends, patch_attends, decoder_attends = attends or (None, None, None)
        context = self._byte_context(layout)
        states = self._encode(self.hash_embedding, self.encoder, ids_BS, layout, context, encoder_attends)
        p_BPG = self._run_patches(states.p_BPG, layout, patch_attends)
        logits_BSV = self._decode(self.decoder, states.byte_states[-1], p_BPG, layout, context, decoder_attends)
        return BLTStates(states.byte_states, p_BPG, logits_BSV)

    def logits(self, ids_BS: torch.Tensor, patch_lengths_BP: torch.Tensor) -> torch.Tensor:
        """Score full rows whose patches are given as lengths, as in `transformers`.

        Args:
            ids_BS: ids, integer [B, S], no padding; a new document begins after each EOS.
            patch_lengths_BP: integer [B, P], each row `[1, ...]`, sum S + 1, right-padded with 0.

        Returns:
            Logits, fp32 [B, S, V].

        Raises:
            ValueError: if the lengths are not of that form.
        """
        layout = layout_from_patch_lengths(ids_BS, patch_lengths_BP)
        return self(ids_BS, layout)

    def stage(self, layers: range, *, is_first: bool, is_last: bool) -> "BLTStage":
        """Return the pipeline stage with these global blocks; it has this model's own modules, not copies.

        Args:
            layers: numbers of the blocks.
            is_first: it has the hash tables and the encoder.
            is_last: it has the decoder.
        """
        return BLTStage(self, layers, is_first=is_first, is_last=is_last)


class BLTStage(_Parts):
    """Consecutive parts of a BLT, under their names in it; see `BLT.stage`. What it lacks is None."""

    def __init__(self, model: BLT, layers: range, *, is_first: bool, is_last: bool):
        super().__init__(model.args)
        self.hash_embedding = model.hash_embedding if is_first else None
        self.encoder = model.encoder if is_first else None
        self.layers = nn.ModuleDict({name: block for name, block in model.layers.items() if int(name) in layers})
        self.decoder = model.decoder if is_last else None

    def forward(
        self, inputs: torch.Tensor, h_BSd: torch.Tensor | None = None, *, layout: PatchLayout
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run these parts.

        Args:
            inputs: in the first stage token ids, integer [B, S]; in others the patch states of the stage before,
                [B, P, G].
            h_BSd: in others than the first, the byte states of the stage before.
            layout: as in `BLT.forward`.

        Returns:
            Of the last stage logits, fp32 [B, S, V]; of others patch states and byte states.
        """
        p_BPG = inputs
        context = self._byte_context(layout) if self.encoder is not None or self.decoder is not None else None
        if self.encoder is not None:
            assert self.hash_embedding is not None
            assert context is not None
            states = self._encode(self.hash_embedding, self.encoder, inputs, layout, context)
            h_BSd, p_BPG = states.byte_states[-1], states.p_BPG
        assert h_BSd is not None
        p_BPG = self._run_patches(p_BPG, layout)
        if self.decoder is None:
            return p_BPG, h_BSd
        assert context is not None
        return self._decode(self.decoder, h_BSd, p_BPG, layout, context)
