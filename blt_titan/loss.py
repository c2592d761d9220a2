"""Next-byte cross-entropy, and what it says in bits per byte.

A document of N bytes has N + 1 targets: its bytes and EOS. The training loss is the sum of nats over all targets
divided by their number; bits per byte leaves EOS out of both, so that it compares with a compressor's figure.
"""

import math

import torch
import torch.nn.functional as F

from blt_titan.batch import IGNORE_LABEL
from blt_titan.byte_vocab import EOS_ID


class ByteCrossEntropy:
    """Sum of nats over targets, [B, S, V] and [B, S] in, a scalar out; remembers the share of EOS.

    Attributes:
        n_targets: what the sum is divided by. Inside the loss, because a pipeline schedule calls backward on what it
            returns.
        eos_nats: sum of nats over EOS targets since it was last set to None, not divided; on the device, so that
            nothing waits.
    """

    def __init__(self):
        self.n_targets: torch.Tensor | float = 1.0
        self.eos_nats: torch.Tensor | None = None

    def __call__(self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Return the sum of nats over all targets, divided by `n_targets`, fp32."""
        labels = labels_BS.long()
        nats_BS = F.cross_entropy(
            logits_BSV.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_LABEL
        ).view_as(labels)
        eos_nats = (nats_BS.detach() * (labels == EOS_ID)).sum()
        self.eos_nats = eos_nats if self.eos_nats is None else self.eos_nats + eos_nats
        return nats_BS.sum() / self.n_targets


def count_targets(labels_BS: torch.Tensor) -> torch.Tensor:
    """Count all targets and those that are EOS, int64 [2]."""
    return torch.stack([(labels_BS != IGNORE_LABEL).sum(), (labels_BS == EOS_ID).sum()])


def bits_per_byte(byte_nats: float, n_bytes: float) -> float:
    """Return nats over byte targets (EOS left out) per byte, in bits; NaN without bytes."""
    return byte_nats / math.log(2) / n_bytes if n_bytes else math.nan
