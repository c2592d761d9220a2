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

import numpy as np
import torch
import torch.nn.functional as F

from blt_titan.batch import PADDING, PatchLayout
from blt_titan.byte_vocab import BOS_ID, NEWLINE_ID
from blt_titan.inference.caches import StackCache
from blt_titan.inference.ledger import PatchLedger
from blt_titan.inference.rows import MarkedIds, layout_rows, pad_ids
from blt_titan.model.blt import BLT, StackAttends
from blt_titan.model.cross_attention import KeysValues, patch_runs
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.layers import run_blocks
from blt_titan.patching.rule import PatchCursor, PatchRule
from blt_titan.scoring.entropies import entropy_nats


class CachedEntropyModel:
    """Next-byte entropies byte by byte.

    Args:
        model: on its device, in the dtype to compute in; it is only read.
    """

    def __init__(self, model: EntropyModel):
        self.model = model
        args = model.args
        self.cache = StackCache(
            args.n_layers, window=args.window, head_dim=args.dim // args.n_heads, theta=args.rope_theta
        )

    def prefill(self, ids_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Read prompts; return the entropy after each byte, fp32 [B, S]."""
        model = self.model
        S = ids_BS.shape[1]
        pos_BS = torch.arange(S, device=ids_BS.device).expand_as(ids_BS)
        document_BS = torch.where(pos_BS < lengths_B[:, None], 0, PADDING)
        context_BS = model.contexts(ids_BS, document_BS)
        self.cache.begin(lengths_B, S)
        if model.args.reset_at_newline:
            source_BT, filled_BT = self.cache.slots_from_prompt(S)
            self.cache.context_BT = torch.where(filled_BT, context_BS.gather(1, source_BT), PADDING)
            self._line_B = context_BS.gather(1, lengths_B[:, None].long() - 1)[:, 0]
        return entropy_nats(model.run(ids_BS, *model.rotation_and_mask(pos_BS, context_BS), self.cache.in_prompt))

    def step(self, ids_B: torch.Tensor, pos_B: torch.Tensor) -> torch.Tensor:
        """Read the next byte of each row; return the entropy after it, fp32 [B]."""
        line_B = None
        if self.model.args.reset_at_newline:
            self._line_B = line_B = self._line_B + (ids_B == NEWLINE_ID)
        rotation, mask = self.cache.step(pos_B, line_B)
        return entropy_nats(self.model.run(ids_B[:, None], rotation, mask, self.cache.to_cache))[:, 0]


class CachedBLT:
    """A BLT that reads prompts and then byte after byte.

    Args:
        model: on its device, in the dtype to compute in; it is only read.
        rule: where patches begin; a causal one.
        entropy_model: of rules by entropy; likewise.

    Raises:
        ValueError: the rule needs entropies and there is no model for them.
    """

    def __init__(self, model: BLT, rule: PatchRule, entropy_model: EntropyModel | None = None):
        rule.require(entropy_model=entropy_model is not None)
        self.model = model
        self.rule = rule
        self.entropies = CachedEntropyModel(entropy_model) if entropy_model is not None else None
        args = model.args
        local = {"window": args.local_window, "head_dim": args.local_head_dim, "theta": args.rope_theta}
        self._encoder_cache = StackCache(args.encoder_layers, **local)
        self._decoder_cache = StackCache(args.decoder_layers, **local)
        self._global_cache = StackCache(
            args.global_layers, window=None, head_dim=args.global_head_dim, theta=args.rope_theta
        )
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
        lengths = np.array([len(ids) for ids in prompts])
        ids = pad_ids(prompts)
        ids_BS, lengths_B = self._on_device(ids), self._on_device(lengths)
        entropies = np.zeros(ids.shape, np.float32)
        if self.entropies is not None:
            entropies = self.rule.rounded(self.entropies.prefill(ids_BS, lengths_B).cpu().numpy())
        rows = [
            MarkedIds(row_ids, self.rule.mark(row_ids, entropies[number, : len(row_ids)], include_next=True))
            for number, row_ids in enumerate(prompts)
        ]
        self._cursor = PatchCursor(self.rule, len(lengths))
        self._cursor.catch_up(ids, entropies, lengths)
        self.ledger = PatchLedger([row.starts for row in rows])
        self.global_steps = 0
        return self._prefill_model(ids_BS, lengths_B, layout_rows(rows))

    def _prefill_model(self, ids_BS: torch.Tensor, lengths_B: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        (B, S), P = ids_BS.shape, layout.patch_doc_BP.shape[1]
        layout = layout.map(lambda field: field.to(self.device))
        closed_B = self._on_device(self.ledger.closed)
        self._encoder_cache.begin(lengths_B, S)
        self._decoder_cache.begin(lengths_B, S)
        self._global_cache.begin(closed_B, P)
        caches = StackAttends(
            self._encoder_cache.in_prompt, self._global_cache.in_prompt, self._decoder_cache.in_prompt
        )
        states = self.model.run(ids_BS, layout, caches)
        rows = torch.arange(B, device=self.device)
        self._keep_open_bytes(states.byte_states, lengths_B)
        self._sources = self.model.decoder.keys_values(states.p_BPG[rows, closed_B - 1][:, None])
        reach = self.model.hash_embedding.reach_bytes
        place_BR = lengths_B[:, None] - reach + torch.arange(reach, device=self.device)
        taken_BR = ids_BS.gather(1, place_BR.clamp(min=0))
        self._before_BR = torch.where(place_BR >= 0, taken_BR, 0)
        return states.logits_BSV[rows, lengths_B - 1]

    def _keep_open_bytes(self, states: Sequence[torch.Tensor], lengths_B: torch.Tensor) -> None:
        """Keep the encoder's states of the bytes of each row's open patch, right after each other."""
        open_bytes = self.ledger.open_bytes
        most = max(1, int(open_bytes.max()))
        open_B = self._on_device(open_bytes)
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
        ids_B = self._on_device(ids.astype(np.int64))
        pos_B = self._on_device(self.ledger.positions)
        most = int(self.ledger.positions.max()) + 1
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
        patch_bytes = self.ledger.add_byte(ends)
        if ends.any():
            self._close_patches(ends, patch_bytes)
        rotation, mask = self._decoder_cache.step(pos_B)
        # Each row's byte reads its only patch.
        sources = patch_runs(torch.zeros(len(ids), 1, dtype=torch.int32, device=self.device), 1)
        to_cache = self._decoder_cache.to_cache
        return self.model.decoder.read_and_decode(h_B1d, self._sources, sources, rotation, mask, to_cache)[:, 0]

    def _encode(self, ids_B: torch.Tensor, pos_B: torch.Tensor) -> torch.Tensor:
        model = self.model
        rotation, mask = self._encoder_cache.step(pos_B)
        ids_B1 = ids_B[:, None]
        # What precedes the document counts as 0, and so it is kept.
        same_BR, same_B1 = torch.zeros_like(self._before_BR), torch.zeros_like(ids_B1)
        hashed_B1d = model.hash_embedding(ids_B1, same_B1, self._before_BR, same_BR)
        states = tuple(model.encoder.byte_states(ids_B1, hashed_B1d, rotation, mask, self._encoder_cache.to_cache))
        rows, place_B = self._encoder_cache.rows, self._on_device(self.ledger.open_bytes)
        for kept_BMd, h_B1d in zip(self._bytes, states, strict=True):
            kept_BMd[rows, place_B] = h_B1d[:, 0]
        self._before_BR = torch.cat([self._before_BR, ids_B1], dim=1)[:, 1:]
        return states[-1]

    def _reserve_open_bytes(self) -> None:
        slots = self._bytes[0].shape[1]
        if (needed := int(self.ledger.open_bytes.max()) + 1) > slots:
            more = max(16, 1 << (needed - 1).bit_length()) - slots
            self._bytes = [F.pad(held, (0, 0, 0, more)) for held in self._bytes]

    def _close_patches(self, ends: np.ndarray, patch_bytes: np.ndarray) -> None:
        """Run the global transformer on the patches that have just ended; other rows' results are not kept."""
        model = self.model
        self.global_steps += 1
        # As many bytes as the longest of them has, in powers of two: few shapes.
        slots = max(4, 1 << (int(patch_bytes[ends].max()) - 1).bit_length())
        slots = min(slots, self._bytes[0].shape[1])
        is_held_BM = torch.arange(slots, device=self.device) < self._on_device(patch_bytes)[:, None]
        runs = patch_runs(torch.where(is_held_BM, 0, -1), 1)
        p_B1G = model.encoder.patch_states([states_BMd[:, :slots] for states_BMd in self._bytes], runs)
        patch_number = self.ledger.closed - ends
        self._global_cache.reserve(int(patch_number.max()) + 1)
        rotation, mask = self._global_cache.step(self._on_device(patch_number))
        p_B1G = run_blocks(model.layers, p_B1G, rotation, mask, self._global_cache.to_cache)
        ends_B111 = self._on_device(ends)[:, None, None, None]
        self._sources = [
            KeysValues(*(torch.where(ends_B111, *pair) for pair in zip(new, old, strict=True)))
            for new, old in zip(model.decoder.keys_values(p_B1G), self._sources, strict=True)
        ]

    # -------------------------------------------------------------------------------------------------- results

    def patch_lengths(self, row: int = 0) -> list[int]:
        """Return the lengths of a row's patches so far, as `BLT.logits` takes them: the next position is counted."""
        return self.ledger.lengths(row)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        caches = [self._encoder_cache, self._decoder_cache, self._global_cache]
        if self.entropies is not None:
            caches.append(self.entropies.cache)
        return sum(cache.bytes_held for cache in caches)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
