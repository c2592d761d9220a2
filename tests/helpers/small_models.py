"""Small models with drawn weights, and rows of real text cut by the space rule."""

from collections.abc import Sequence

import numpy as np
import torch

from blt_titan.batch import WHOLE_ROW, ContextSlice, PatchLayout
from blt_titan.byte_vocab import document_ids
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import PatchedIds, Row, RowShape, pack_row
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching import rule_patch_starts, starts_to_lengths

DOCUMENTS = [
    b"The quick brown fox, it jumps.",
    "π is 3.14; 42% of π, no more!".encode(),
    b"x",
    b"A rather long one without any end and withasinglepatchofmanybytes in it",
]


def small_blt(**changes) -> BLT:
    args = dict(
        local_dim=32,
        local_heads=2,
        local_window=8,
        local_ffn_hidden=48,
        encoder_layers=1,
        decoder_layers=2,
        global_dim=64,
        global_heads=2,
        global_layers=2,
        global_ffn_hidden=80,
        cross_attn_k=2,
        cross_attn_heads=4,
        hash_rows=997,
    )
    return drawn(BLT(BLTArgs(**(args | changes))))


def small_entropy_model(**changes) -> EntropyModel:
    args = dict(dim=32, n_heads=2, n_layers=2, ffn_hidden=48, window=8)
    return drawn(EntropyModel(EntropyModelArgs(**(args | changes))))


def drawn(model):
    """Draw the weights, norms too, so that a norm left out or taken for another one shows."""
    model.init_weights()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def space_lengths(ids: torch.Tensor) -> torch.Tensor:
    """Lengths of the patches of ids [N] and the target that follows: they sum to N + 1."""
    return starts_to_lengths(rule_patch_starts(ids, rule="space", include_next=True))


def batch_by_spaces(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows of one length: ids [B, S] and patch lengths [B, P], right-padded with 0."""
    lengths = [space_lengths(row) for row in rows]
    return torch.stack(list(rows)), torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)


def documents_by_spaces(documents: Sequence[bytes]) -> PatchedIds:
    ids = np.concatenate([document_ids(document) for document in documents])
    return PatchedIds(ids, np.append(np.flatnonzero(rule_patch_starts(ids, rule="space")), len(ids)))


def packed(documents: Sequence[bytes], shape: RowShape) -> Row:
    row = pack_row(documents_by_spaces(documents), shape)
    assert row.n_ids == sum(len(document) + 2 for document in documents), "the documents do not fit the row"
    return row


def stack_rows(
    rows: Sequence[Row], shape: RowShape, part: ContextSlice = WHOLE_ROW
) -> tuple[torch.Tensor, torch.Tensor, PatchLayout]:
    """Return ids [B, S], labels [B, S] and the layout."""
    batch = collate_rows(rows, shape, part)
    return batch.ids_BS, batch.labels_BS, batch.layout
