"""Held-out bits per byte over rows: documents in order, each byte scored once, no context across rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from blt_titan.batch import Batch
from blt_titan.data.rows.copies import copied_ahead
from blt_titan.loss import ByteCrossEntropy, bits_per_byte, count_targets


@dataclass(frozen=True)
class HeldOutScore:
    """Sums over a held-out split; EOS is a target too, and is kept apart."""

    byte_nats: float
    eos_nats: float
    n_bytes: int
    n_eos: int

    @property
    def bits_per_byte(self) -> float:
        """Nats over bytes / ln 2 / bytes."""
        return bits_per_byte(self.byte_nats, self.n_bytes)

    @property
    def loss_nats(self) -> float:
        """Nats per target, EOS included, as the training loss counts them."""
        n_targets = self.n_bytes + self.n_eos
        return (self.byte_nats + self.eos_nats) / n_targets if n_targets else math.nan


ScoreBatch = Callable[[Batch], torch.Tensor]
"""Sums of a batch, float64 [4]: nats of bytes, nats of EOS, targets that are bytes, targets that are EOS."""


def batch_scorer(model: Callable[..., torch.Tensor]) -> ScoreBatch:
    """Return the scorer of a model that is called with the ids [B, S] and their layout, and returns logits."""
    loss_fn = ByteCrossEntropy()

    def score(batch: Batch) -> torch.Tensor:
        ids_BS, layout, labels_BS = batch
        with loss_fn.step(1.0) as sums:
            nats = loss_fn(model(ids_BS, layout), labels_BS)
        assert sums.eos_nats is not None
        return batch_sums(nats, sums.eos_nats, labels_BS)

    return score


def batch_sums(nats: torch.Tensor, eos_nats: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Return the sums of `ScoreBatch` from the nats of all targets and of EOS."""
    n_targets, n_eos = count_targets(labels_BS)
    return torch.stack([(nats - eos_nats).double(), eos_nats.double(), n_targets - n_eos, n_eos])


@torch.no_grad()
def score_batches(
    score: ScoreBatch,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> HeldOutScore:
    """Score all targets of `batches`.

    Args:
        score: scores one batch on the device, `batch_scorer(model)` for a model on one.
        batches: as the loaders yield them.
        device: where the model is.
        reduce: sums a float64 [4] over the ranks that hold other batches; None for one rank.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in copied_ahead(batches, device):
        sums += score(batch)
    if reduce is not None:
        sums = reduce(sums)
    byte_nats, eos_nats, n_bytes, n_eos = sums.tolist()
    return HeldOutScore(byte_nats, eos_nats, round(n_bytes), round(n_eos))
