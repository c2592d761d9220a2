"""How long a step takes, from FLOPs and collectives. Estimated, not measured.

A step is computing, the pipeline's bubble, and what of the network's time is not hidden behind computing:

    computing   3 forwards of the model's FLOPs (4 of what is computed again) / (card's bf16 FLOP/s * MFU)
    bubble      a pipeline of p ranks, v stages on each, m micro-batches waits (p - 1) / (v m) of that
    stages      the largest stage sets the pace: computing by its share of the FLOPs, times the number of stages
    network     weights and gradients (axes `fsdp`, `bytes`, `dp_replicate`, `all`) move while a micro-batch computes,
                and count where they take longer; what attention and tensor parallelism exchange is waited for
"""

from collections.abc import Iterable
from dataclasses import dataclass

from blt_titan.dry_run.sent import Collective
from blt_titan.plan.network import Network

HIDDEN_AXES = ("fsdp", "bytes", "dp_replicate", "all")
"""Axes whose collectives run beside computing."""
WITHIN_KINDS = ("all-to-all",)
"""Collectives over those axes that a micro-batch waits for: the exchange of hash columns."""


@dataclass(frozen=True)
class Compute:
    """What a rank has to compute in a step."""

    flops: float
    """Forward and backward, what is computed again not counted."""
    recomputed_flops: float
    """Likewise of what backward computes again."""
    imbalance: float
    """Largest stage by mean stage; 1 without a pipeline."""
    bubble: float
    """Share of the computing that a pipeline waits on top."""
    micro_batches: int
    """Rounds of gradient accumulation in a step."""


@dataclass(frozen=True)
class StepTime:
    """Parts of a step, seconds."""

    compute_s: float
    bubble_s: float
    hidden_network_s: float
    """Moved while computing."""
    exposed_network_s: float
    """Waited for."""
    mfu: float
    """Share of the card's FLOP/s that was assumed or given for computing alone."""

    @property
    def seconds(self) -> float:
        """Return the step's time."""
        return self.compute_s + self.bubble_s + self.exposed_network_s


def step_time(
    compute: Compute, sent: Iterable[Collective], network: Network, *, flops_per_s: float, mfu: float
) -> StepTime:
    """Estimate a step.

    Args:
        compute: of the busiest rank.
        sent: of a rank, as a dry run saw it.
        network: between ranks.
        flops_per_s: of the card, dense.
        mfu: share of those that computing reaches, bubbles and network aside.
    """
    busy = (compute.flops + compute.recomputed_flops) * compute.imbalance / (flops_per_s * mfu)
    behind = waited = 0.0
    for collective in sent:
        seconds = network.seconds(collective) * (compute.micro_batches if collective.in_micro_batch else 1)
        if collective.axis in HIDDEN_AXES and collective.kind not in WITHIN_KINDS and collective.in_micro_batch:
            behind += seconds
        else:
            waited += seconds
    exposed = max(0.0, behind - busy)
    return StepTime(
        compute_s=busy,
        bubble_s=busy * compute.bubble,
        hidden_network_s=behind - exposed,
        exposed_network_s=exposed + waited,
        mfu=mfu,
    )
