"""Held-out scores against scoring each document alone; finding checkpoints."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan.byte_vocab import document_ids
from blt_titan.checkpoint.find import find_checkpoint, latest_checkpoint
from blt_titan.checkpoint.load import load_weights
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.data.prepare.job import prepare
from blt_titan.data.rows.held_out import HeldOutRows
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.patcher import TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.shards import ShardSet
from blt_titan.evaluation.rows import batch_scorer, score_batches
from blt_titan.model.args import BLTArgs
from blt_titan.model.blt import BLT
from blt_titan.patching import rule_patch_starts, starts_to_lengths
from blt_titan.patching.rule import PatchRule

NATS_RTOL = 1e-5
"""fp32 logits of a packed row and of a document alone differ by rounding."""

MARK_NEXT = partial(rule_patch_starts, rule="space", max_patch_bytes=64, include_next=True)
DOCUMENTS = [b"to be, or not to be", b"that is the question:", b"whether 'tis nobler in the mind to suffer", b"x"]


@pytest.fixture(scope="module")
def model() -> BLT:
    args = BLTArgs(
        local_dim=32,
        local_heads=2,
        local_window=16,
        decoder_layers=2,
        global_dim=64,
        global_heads=2,
        global_layers=2,
        cross_attn_heads=2,
        hash_rows=101,
    )
    model = BLT(args).eval()
    model.init_weights()
    return model


def test_held_out_score_equals_documents_alone(model, tmp_path):
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_bytes(text)
    prepare([tmp_path], tmp_path.parent / "shards", validation_fraction=0, seed=0, progress=False)
    source = RowSource(
        ShardSet(tmp_path.parent / "shards", "train"),
        TextPatcher(PatchRule("space", max_patch_bytes=64)),
        # One row holds all documents, so that none loses context at a row border.
        RowShape(segments=2, segment_bytes=128, segment_patches=40),
    )
    score = score_batches(batch_scorer(model), HeldOutRows(source, rows_per_batch=2))

    byte_nats = eos_nats = 0.0
    for text in DOCUMENTS:
        ids = document_ids(text)
        inputs, targets = ids[:-1], torch.from_numpy(ids[1:].astype(np.int64))
        lengths = torch.from_numpy(starts_to_lengths(MARK_NEXT(inputs)))
        with torch.no_grad():
            logits_SV = model.logits(torch.from_numpy(inputs.astype(np.int64))[None], lengths[None])[0]
        nats_S = torch.nn.functional.cross_entropy(logits_SV, targets, reduction="none")
        byte_nats += nats_S[:-1].sum().item()
        eos_nats += nats_S[-1].item()
    n_bytes = sum(map(len, DOCUMENTS))
    assert (score.n_bytes, score.n_eos) == (n_bytes, len(DOCUMENTS))
    assert score.byte_nats == pytest.approx(byte_nats, rel=NATS_RTOL)
    assert score.eos_nats == pytest.approx(eos_nats, rel=NATS_RTOL)
    assert score.bits_per_byte == pytest.approx(byte_nats / math.log(2) / n_bytes, rel=NATS_RTOL)
    assert score.loss_nats == pytest.approx((byte_nats + eos_nats) / (n_bytes + len(DOCUMENTS)), rel=NATS_RTOL)


def test_latest_checkpoint_skips_what_is_half_written(model, tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path)
    for step, complete_ in ((2, True), (10, True), (30, False)):
        save(model.decoder.state_dict(), checkpoint_id=str(tmp_path / f"step-{step}"), no_dist=True)
        if not complete_:
            (tmp_path / f"step-{step}" / ".metadata").unlink()
    assert latest_checkpoint(tmp_path).name == "step-10"
    # What a killed machine leaves is passed over aloud; named directly, it is refused.
    (tmp_path / "step-10" / ".metadata").write_bytes(b"")
    assert find_checkpoint(tmp_path).name == "step-2"
    assert "step-10 is passed over" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-10/\.metadata: is empty"):
        find_checkpoint(tmp_path / "step-10")
    (tmp_path / "step-2" / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its checkpoints is sound"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a model directory"):
        find_checkpoint(tmp_path)


def test_weights_come_back_from_a_checkpoint(model, tmp_path):
    save(model.state_dict(), checkpoint_id=str(tmp_path), no_dist=True)
    other = BLT(model.args)
    load_weights(other, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
