import json
import math

import numpy as np
import pytest
import torch

from blt_titan.batch import IGNORE_LABEL, Batch
from blt_titan.byte_vocab import EOS_ID
from blt_titan.layout import lay_out
from blt_titan.loss import ByteCrossEntropy, bits_per_byte
from blt_titan.training.metrics import COUNTS, JsonLines, count_batch


def test_loss_is_the_sum_over_targets_and_keeps_eos_apart():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 260, requires_grad=True)
    labels = torch.tensor([[70, EOS_ID, IGNORE_LABEL, 4, 5], [IGNORE_LABEL] * 4 + [EOS_ID]], dtype=torch.int32)
    loss_fn = ByteCrossEntropy()
    with loss_fn.step(1.0) as sums:
        loss = loss_fn(logits, labels)
    log_p = logits.log_softmax(-1)
    nats = {(b, s): -log_p[b, s, labels[b, s]].item() for b in (0, 1) for s in range(5) if labels[b, s] >= 0}
    assert loss.item() == pytest.approx(sum(nats.values()), rel=1e-6)
    assert sums.eos_nats is not None
    assert sums.eos_nats.item() == pytest.approx(nats[0, 1] + nats[1, 4], rel=1e-6)
    with loss_fn.step(4.0) as sums:
        quarters = [loss_fn(logits, labels).item() for _ in range(2)]
    assert quarters == [loss.item() / 4] * 2
    assert sums.eos_nats is not None
    assert sums.eos_nats.item() == pytest.approx(2 * (nats[0, 1] + nats[1, 4]), rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[0, 2].any()


def test_a_step_leaves_nothing_behind():
    logits, labels = torch.randn(1, 3, 260), torch.tensor([[EOS_ID, 70, 71]])
    loss_fn = ByteCrossEntropy()
    with pytest.raises(ValueError, match="of the step"), loss_fn.step(4.0):
        raise ValueError("of the step")
    with pytest.raises(AssertionError, match="outside of a step"):
        loss_fn(logits, labels)
    with loss_fn.step(1.0) as sums:
        assert sums.eos_nats is None
        with pytest.raises(AssertionError, match="a step within a step"), loss_fn.step(1.0):
            pass


def test_a_batch_without_targets_weighs_nothing():
    logits = torch.randn(1, 3, 260, requires_grad=True)
    loss_fn = ByteCrossEntropy()
    with loss_fn.step(1.0):
        loss = loss_fn(logits, torch.full((1, 3), IGNORE_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2) * 10, 10) == pytest.approx(8)
    assert math.isnan(bits_per_byte(0.0, 0))


def test_counts_are_of_real_bytes_and_patches():
    layout = lay_out(np.array([[1, 2, 2, 0]]), np.array([[0, 0, 1, 0]]), 6)
    labels = torch.tensor([[70, EOS_ID, IGNORE_LABEL, 71, 72, IGNORE_LABEL]])
    counts = dict(
        zip(COUNTS, count_batch(Batch(torch.zeros_like(labels), layout, labels), quarantined=2).tolist(), strict=True)
    )
    assert counts == {
        "byte_targets": 3,
        "eos_targets": 1,
        "bytes": 5,
        "byte_slots": 6,
        "patches": 3,
        "patch_slots": 4,
        "quarantined": 2,
    }


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_continue_after_the_checkpoint_and_lose_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in (1, 2, 3):
        first.write({"step": step, "loss_nats": 1 / 3})
    resumed = JsonLines(path)
    resumed.resume_at(2)
    resumed.write({"step": 3, "loss_nats": 0.5})
    assert read(path) == [
        {"step": 1, "loss_nats": 1 / 3},
        {"step": 2, "loss_nats": 1 / 3},
        {"step": 3, "loss_nats": 0.5},
    ]
    (old,) = tmp_path.glob("metrics.jsonl.*")
    assert [line["step"] for line in read(old)] == [1, 2, 3]


def test_json_lines_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    resumed = JsonLines(path)
    resumed.resume_at(2)
    resumed.write({"step": 3})
    assert [line["step"] for line in read(path)] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"\0" * 4096, b'\0\0\n\xff\xfe\n[1]\n{"step": null}\n' + b"[" * 100_000 + b"\n"])
def test_json_lines_survive_what_a_machine_that_stopped_leaves(damage, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + damage)
    resumed = JsonLines(path)
    resumed.resume_at(2)
    resumed.write({"step": 3})
    assert [line["step"] for line in read(path)] == [1, 2, 3]
    (old,) = tmp_path.glob("metrics.jsonl.*")
    assert old.read_bytes().endswith(damage)


def test_json_lines_that_cannot_be_written_do_not_end_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    lines = JsonLines(path)
    for step in (1, 2):
        lines.write({"step": step})
    path.rmdir()
    lines.write({"step": 3})
    assert read(path) == [{"step": 3}]
