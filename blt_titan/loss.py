"""Next-byte cross-entropy, and what it says in bits per byte.

A document of N bytes has N + 1 targets: its bytes and EOS. The training loss is the sum of nats over all targets
divided by their number; bits per byte leaves EOS out of both, so that it compares with a compressor's figure.

A step says what its sums are divided by, and gets the share of EOS back. Pipeline schedules call the loss themselves,
on one micro-batch after another, so both pass through a context around them:

    with loss.step(1.0) as sums:            # not divided: targets are counted as micro-batches come, and gradients
        schedule.step(...)                  # divided in the end; calls loss(logits, labels), and backward on that
    sums.eos_nats
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from blt_titan.batch import IGNORE_LABEL, Batch
from blt_titan.byte_vocab import EOS_ID


@dataclass
class StepSums:
    """What the calls of one step add up."""

    eos_nats: torch.Tensor | None = None
    """Nats over EOS targets, not divided, fp32 scalar on the device, so that nothing waits; None before a call."""


class ByteCrossEntropy:
    """Nats over targets, [B, S, V] and [B, S] in, a scalar out; to be called within `step`.

    Args:
        compile_backend: of torch.compile; None for not compiled.
    """

    def __init__(self, compile_backend: str | None = None):
        self._add_nats = sum_nats
        if compile_backend is not None:
            self._add_nats = torch.compile(sum_nats, backend=compile_backend, fullgraph=True, dynamic=False)
        self._n_targets: torch.Tensor | float = math.nan
        self._sums: StepSums | None = None

    @contextmanager
    def step(self, n_targets: torch.Tensor | float) -> Iterator[StepSums]:
        """Divide by `n_targets` within the context, and sum up EOS.

        Inside the loss, because a pipeline schedule calls backward on what it returns.
        """
        assert self._sums is None, "a step within a step"
        self._n_targets, self._sums = n_targets, StepSums()
        try:
            yield self._sums
        finally:
            self._n_targets, self._sums = math.nan, None

    def __call__(self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Return the sum of nats over all targets, divided by the step's number of targets, fp32."""
        assert self._sums is not None, "the loss is called outside of a step"
        nats, eos_nats = self._add_nats(logits_BSV, labels_BS)
        self._sums.eos_nats = eos_nats if self._sums.eos_nats is None else self._sums.eos_nats + eos_nats
        return nats / self._n_targets


def sum_nats(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum nats over all targets, and over those that are EOS (without gradient), fp32 scalars."""
    labels = labels_BS.long()
    nats_BS = F.cross_entropy(
        logits_BSV.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_LABEL
    ).view_as(labels)
    return nats_BS.sum(), (nats_BS.detach() * (labels == EOS_ID)).sum()


def count_targets(labels_BS: torch.Tensor) -> torch.Tensor:
    """Count all targets and those that are EOS, int64 [2]."""
    return torch.stack([(labels_BS != IGNORE_LABEL).sum(), (labels_BS == EOS_ID).sum()])


def bits_per_byte(byte_nats: float, n_bytes: float) -> float:
    """Return nats over byte targets (EOS left out) per byte, in bits; NaN without bytes."""
    return byte_nats / math.log(2) / n_bytes if n_bytes else math.nan


def count_along(batches: Iterable[Batch], targets: torch.Tensor) -> Iterator[Batch]:
    """Yield batches of the host, adding to `targets`, int64 [2], what `count_targets` says of each."""
    for batch in batches:
        targets += count_targets(batch.labels_BS)
        yield batch
