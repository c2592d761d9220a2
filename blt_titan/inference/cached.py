"""Generation with caches at all three levels; the global transformer runs only when a patch ends.

    byte i  ->  entropy model  ->  does a patch end with i?
            ->  encoder        ->  if so: pool its bytes, run the global transformer on the patch just closed
            ->  decoder, which reads the newest closed patch  ->  logits of byte i + 1

A byte that ends a patch reads that patch; the others read the one before theirs: the source of byte i is the patch just
before the one that holds i + 1. So a patch is always closed in time, and what is computed is what a forward of the
whole row computes with the same patches.

Rows of a batch are at positions of their own. A step is three fixed sequences of operations on fixed shapes (entropy
model and encoder; global transformer; decoder) with one look at the entropies between the first and the second.

Letters: B rows, S byte slots, P patch slots, d local width, G global width, k slots of a patch (written N),
V vocabulary, M bytes of an open patch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from blt_titan.batch import PADDING, PatchLayout
from blt_titan.byte_vocab import BOS_ID, NEWLINE_ID
from blt_titan.inference.caches import StackCache
from blt_titan.inference.rows import MarkedIds, layout_rows, pad_ids
from blt_titan.model.attention import causal_mask, window_mask
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.layers import rotary_angles
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rule import PatchCursor, PatchRule
from blt_titan.scoring.entropies import entropy_nats


class CachedEntropyModel:
    """Next-byte entropies byte by byte; takes the model over.

    Args:
        model: on its device, in the dtype to compute in.
    """

    def __init__(self, model: EntropyModel):
        self.model = model.eval().requires_grad_(False)
        args = model.args
        self.cache = StackCache(
            model.layers, window=args.window, head_dim=args.dim // args.n_heads, theta=args.rope_theta
        )

    def prefill(self, ids_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Read prompts; return the entropy after each byte, fp32 [B, S]."""
        model, args = self.model, self.model.args
        S = ids_BS.shape[1]
        pos_BS = torch.arange(S, device=ids_BS.device).expand_as(ids_BS)
        document_BS = torch.where(pos_BS < lengths_B[:, None], 0, PADDING)
        context_BS = model.contexts(ids_BS, document_BS)
        self.cache.begin(lengths_B, S)
        if args.reset_at_newline:
            source_BT, there_BT = self.cache.from_prompt(S)
            self.cache.context_BT = torch.where(there_BT, context_BS.gather(1, source_BT), PADDING)
            self._line_B = context_BS.gather(1, lengths_B[:, None].long() - 1)[:, 0]
        rotation = rotary_angles(pos_BS, head_dim=args.dim // args.n_heads, theta=args.rope_theta)
        mask = window_mask(context_BS, window=args.window, backend=args.attention_backend)
        h = model.tok_embeddings(ids_BS)
        for block in model.layers.values():
            h = block(h, rotation, mask)
        return entropy_nats(model.output(model.norm(h)))

    def step(self, ids_B: torch.Tensor, pos_B: torch.Tensor) -> torch.Tensor:
        """Read the next byte of each row; return the entropy after it, fp32 [B]."""
        model = self.model
        line_B = None
        if model.args.reset_at_newline:
            self._line_B = line_B = self._line_B + (ids_B == NEWLINE_ID)
        rotation = self.cache.step(pos_B, line_B)
        h = model.tok_embeddings(ids_B[:, None])
        for block in model.layers.values():
            h = block(h, rotation, None)
        return entropy_nats(model.output(model.norm(h)))[:, 0]


class CachedBLT:
    """A BLT that reads prompts and then byte after byte; takes both models over.

    Args:
        model: on its device, in the dtype to compute in.
        rule: where patches begin; a causal one.
        entropy_model: of rules by entropy.

    Raises:
        ValueError: the rule goes by entropy and there is no model for it.
    """

    def __init__(self, model: BLT, rule: PatchRule, entropy_model: EntropyModel | None = None):
        rule.require(entropy_model=entropy_model is not None)
        self.model = model.eval().requires_grad_(False)
        self.rule = rule
        self.entropies = CachedEntropyModel(entropy_model) if entropy_model is not None else None
        args = model.args
        local = {"window": args.local_window, "head_dim": args.local_head_dim, "theta": args.rope_theta}
        self._encoder_cache = StackCache(model.encoder.layers, **local)
        self._decoder_cache = StackCache(model.decoder.layers, **local)
        self._global_cache = StackCache(model.layers, window=None, head_dim=args.global_head_dim, theta=args.rope_theta)
        self._first_cross = args.encoder_layers - len(model.encoder.cross_attention)
        self.device = model.decoder.output.weight.device
        self.global_steps = 0
        """How often the global transformer ran since the prompts."""

    # ------------------------------------------------------------------------------------------------- prompts

    @torch.no_grad()
    def prefill(self, prompts: Sequence[np.ndarray]) -> torch.Tensor:
        """Read prompts, which may differ in length.

        Args:
            prompts: ids of each row, beginning with BOS, integer [S_b].

        Returns:
            Logits of the byte after each prompt, fp32 [B, V].
        """
        assert all(len(ids) and ids[0] == BOS_ID for ids in prompts), "a prompt begins with BOS"
        for cache in self._caches:
            cache.install()
        lengths = np.array([len(ids) for ids in prompts])
        ids = pad_ids(prompts)
        ids_BS, lengths_B = torch.from_numpy(ids).to(self.device), torch.from_numpy(lengths).to(self.device)
        entropies = np.zeros(ids.shape, np.float32)
        if self.entropies is not None:
            entropies = self.rule.rounded(self.entropies.prefill(ids_BS, lengths_B).cpu().numpy())
        rows = [
            MarkedIds(of_row, self.rule.mark(of_row, entropies[number, : len(of_row)], include_next=True))
            for number, of_row in enumerate(prompts)
        ]
        self._begin_cursor(ids, entropies, lengths, [row.starts for row in rows])
        self._positions = lengths.copy()
        self.global_steps = 0
        return self._prefill_model(ids_BS, lengths_B, layout_rows(rows))

    def _begin_cursor(
        self, ids: np.ndarray, entropies: np.ndarray, lengths: np.ndarray, starts: list[np.ndarray]
    ) -> None:
        self._cursor = PatchCursor(self.rule, len(lengths))
        self._cursor.catch_up(ids, entropies, lengths)
        self._lengths = [starts_to_lengths(of_row).tolist() for of_row in starts]
        for row, of_row in enumerate(self._lengths):
            # The position after the prompt has no byte yet: it begins a patch or lengthens the open one.
            of_row[-1] -= 1
            if not of_row[-1]:
                of_row.pop()
            assert sum(of_row) == lengths[row]
        closed = [bool(of_row[-1]) for of_row in starts]
        self._closed = np.array([len(r) if c else len(r) - 1 for r, c in zip(self._lengths, closed, strict=True)])
        self._open = np.array([0 if c else r[-1] for r, c in zip(self._lengths, closed, strict=True)])

    def _prefill_model(self, ids_BS: torch.Tensor, lengths_B: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        model, args = self.model, self.model.args
        (B, S), P = ids_BS.shape, layout.patch_doc_BP.shape[1]
        at = {name: tensor.to(self.device) for name, tensor in layout.as_dict().items()}
        pos_BS, document_BS, patch_doc_BP = at["byte_pos_BS"], at["byte_doc_BS"], at["patch_doc_BP"]
        self._encoder_cache.begin(lengths_B, S)
        self._decoder_cache.begin(lengths_B, S)
        self._global_cache.begin(torch.from_numpy(self._closed).to(self.device), P)
        rotation = rotary_angles(pos_BS, head_dim=args.local_head_dim, theta=args.rope_theta)
        mask = window_mask(document_BS, window=args.local_window, backend=args.attention_backend)
        patch_BS = torch.where(at["byte_patch_BS"] < 0, P, at["byte_patch_BS"])
        h_BSd = model.encoder.tok_embeddings(ids_BS) + model.hash_embedding(ids_BS, document_BS)
        p_BPX, states = None, []
        for i, block in enumerate(model.encoder.layers.values()):
            h_BSd = block(h_BSd, rotation, mask)
            p_BPX = model.encoder.read_bytes(i, p_BPX, h_BSd, patch_BS, P)
            if i >= self._first_cross:
                states.append(h_BSd)
        assert p_BPX is not None
        p_BPG = model.encoder.to_global(p_BPX)
        patch_mask = causal_mask(patch_doc_BP, backend=args.attention_backend)
        patch_rotation = rotary_angles(at["patch_pos_BP"], head_dim=args.global_head_dim, theta=args.rope_theta)
        for block in model.layers.values():
            p_BPG = block(p_BPG, patch_rotation, patch_mask)
        logits_BSV = model.decoder(h_BSd, p_BPG, at["source_patch_BS"], rotation, mask)
        self._keep_open_bytes(states, lengths_B)
        rows = torch.arange(B, device=self.device)
        closed_B = torch.from_numpy(self._closed).to(self.device)
        self._sources = self._keys_values(p_BPG[rows, closed_B - 1][:, None])
        reach = model.hash_embedding.reach_bytes
        place_BR = lengths_B[:, None] - reach + torch.arange(reach, device=self.device)
        taken_BR = ids_BS.gather(1, place_BR.clamp(min=0))
        self._before_BR = torch.where(place_BR >= 0, taken_BR, 0)
        return logits_BSV[rows, lengths_B - 1]

    def _keep_open_bytes(self, states: list[torch.Tensor], lengths_B: torch.Tensor) -> None:
        """Keep the encoder's states of the bytes of each row's open patch, right after each other."""
        most = max(1, int(self._open.max()))
        open_B = torch.from_numpy(self._open).to(self.device)
        place_BM = lengths_B[:, None] - open_B[:, None] + torch.arange(most, device=self.device)
        place_BM = place_BM.clamp(max=states[0].shape[1] - 1)
        rows = torch.arange(len(lengths_B), device=self.device)[:, None]
        self._bytes = [state[rows, place_BM] for state in states]

    # --------------------------------------------------------------------------------------------------- steps

    @torch.no_grad()
    def step(self, ids: np.ndarray) -> torch.Tensor:
        """Read the next byte of each row.

        Args:
            ids: integers [B].

        Returns:
            Logits of the byte after it, fp32 [B, V].
        """
        ids_B = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        pos_B = torch.from_numpy(self._positions).to(self.device)
        most = int(self._positions.max()) + 1
        for cache in (self._encoder_cache, self._decoder_cache):
            cache.reserve(most)
        entropies = None
        if self.entropies is not None:
            self.entropies.cache.reserve(most)
            entropies_B = self.entropies.step(ids_B, pos_B)
        self._reserve_open_bytes()
        h_B1d = self._encode(ids_B, pos_B)
        if self.entropies is not None:
            entropies = self.rule.rounded(entropies_B.cpu().numpy())
        ends = self._cursor.ends(ids, entropies)
        self._count(ends)
        if ends.any():
            self._close_patches(ends)
        return self._decode(h_B1d, pos_B)

    def _encode(self, ids_B: torch.Tensor, pos_B: torch.Tensor) -> torch.Tensor:
        model = self.model
        rotation = self._encoder_cache.step(pos_B)
        ids_B1 = ids_B[:, None]
        # What precedes the document counts as 0, and so it is kept.
        same_BR, same_B1 = torch.zeros_like(self._before_BR), torch.zeros_like(ids_B1)
        hashed_B1d = model.hash_embedding(ids_B1, same_B1, self._before_BR, same_BR)
        h_B1d = model.encoder.tok_embeddings(ids_B1) + hashed_B1d
        rows, place_B = self._encoder_cache.rows, torch.from_numpy(self._open).to(self.device)
        for i, block in enumerate(model.encoder.layers.values()):
            h_B1d = block(h_B1d, rotation, None)
            if i >= self._first_cross:
                self._bytes[i - self._first_cross][rows, place_B] = h_B1d[:, 0]
        self._before_BR = torch.cat([self._before_BR, ids_B1], dim=1)[:, 1:]
        return h_B1d

    def _reserve_open_bytes(self) -> None:
        slots = self._bytes[0].shape[1]
        if (needed := int(self._open.max()) + 1) > slots:
            more = max(16, 1 << (needed - 1).bit_length()) - slots
            self._bytes = [F.pad(held, (0, 0, 0, more)) for held in self._bytes]

    def _count(self, ends: np.ndarray) -> None:
        for row, of_row in enumerate(self._lengths):
            if self._open[row]:
                of_row[-1] += 1
            else:
                of_row.append(1)
        self._held = self._open + 1
        self._open = np.where(ends, 0, self._held)
        self._positions = self._positions + 1

    def _close_patches(self, ends: np.ndarray) -> None:
        """Run the global transformer on the patches that have just ended; other rows' results are not kept."""
        model = self.model
        self.global_steps += 1
        # As many bytes as the longest of them has, in powers of two: few shapes.
        slots = max(4, 1 << (int(self._held[ends].max()) - 1).bit_length())
        slots = min(slots, self._bytes[0].shape[1])
        held_B1 = torch.from_numpy(self._held).to(self.device)[:, None]
        patch_BM = (torch.arange(slots, device=self.device) >= held_B1).long()
        p_B1X = None
        for number, states_BMd in enumerate(self._bytes):
            p_B1X = model.encoder.read_bytes(self._first_cross + number, p_B1X, states_BMd[:, :slots], patch_BM, 1)
        assert p_B1X is not None
        p_B1G = model.encoder.to_global(p_B1X)
        self._global_cache.reserve(int(self._closed.max()) + 1)
        rotation = self._global_cache.step(torch.from_numpy(self._closed).to(self.device))
        for block in model.layers.values():
            p_B1G = block(p_B1G, rotation, None)
        ends_B111 = torch.from_numpy(ends).to(self.device)[:, None, None, None]
        self._sources = [
            (torch.where(ends_B111, k, old_k), torch.where(ends_B111, v, old_v))
            for (k, v), (old_k, old_v) in zip(self._keys_values(p_B1G), self._sources, strict=True)
        ]
        self._closed = self._closed + ends

    def _keys_values(self, p_B1G: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Project a patch of each row for every layer of the decoder that reads it."""
        decoder = self.model.decoder
        slots_B1Nd = decoder.patch_projection(p_B1G).unflatten(-1, (decoder.slots_per_patch, -1))
        return [cross.keys_values(slots_B1Nd) for cross in _cross_attention(decoder)]

    def _decode(self, h_B1d: torch.Tensor, pos_B: torch.Tensor) -> torch.Tensor:
        decoder = self.model.decoder
        rotation = self._decoder_cache.step(pos_B)
        source_B1 = torch.zeros(len(h_B1d), 1, dtype=torch.int64, device=self.device)
        for i, block in enumerate(decoder.layers.values()):
            if i < len(self._sources):
                h_B1d = h_B1d + _cross_attention(decoder)[i].read(h_B1d, *self._sources[i], source_B1)
            h_B1d = block(h_B1d, rotation, None)
        return decoder.output(decoder.norm(h_B1d)).float()[:, 0]

    # -------------------------------------------------------------------------------------------------- results

    def patch_lengths(self, row: int = 0) -> list[int]:
        """Return the lengths of a row's patches so far, as `BLT.logits` takes them: the next position is counted."""
        lengths = list(self._lengths[row])
        if self._open[row]:
            lengths[-1] += 1
        else:
            lengths.append(1)
        return lengths

    def release(self) -> None:
        """Give the models back: they compute whole rows again."""
        for cache in self._caches:
            cache.release()

    @property
    def _caches(self) -> list[StackCache]:
        caches = [self._encoder_cache, self._decoder_cache, self._global_cache]
        return caches if self.entropies is None else [*caches, self.entropies.cache]

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values."""
        return sum(cache.bytes_held for cache in self._caches)


def _cross_attention(decoder: Any) -> Any:
    return decoder.cross_attention
