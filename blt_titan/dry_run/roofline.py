"""An estimate of a micro-batch's time on a card: the larger of bytes and FLOPs for each kernel, and a launch.

Nothing is measured, and communication is not in it: gaps, waits for other ranks and the host come on top. What is
assumed of the card stands in `cards.Card` and is printed with the estimate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from blt_titan.dry_run.cards import Card


@dataclass(frozen=True)
class Work:
    """Kernels of one class in one micro-batch."""

    what: str
    kernels: int
    seconds: float
    flops: float
    moved_bytes: float


@dataclass(frozen=True)
class Roofline:
    """The estimate of a rank's micro-batch."""

    work: list[Work]
    """By class of kernels, longest first."""
    update_seconds: float
    """Clipping and optimizer, once per step."""
    sent_bytes: dict[str, float]
    """Results of collectives in a micro-batch, by collective; their time is not estimated."""
    model_flops: float
    """FLOPs of forward and backward by the formula of the model, without what is computed again."""
    micro_batch_bytes: int
    """Byte slots of a micro-batch on a rank."""
    assumptions: dict[str, float]
    """Figures of the card that were used."""

    @property
    def seconds(self) -> float:
        """Return the time of a micro-batch."""
        return sum(work.seconds for work in self.work)

    @property
    def mfu(self) -> float:
        """Return the share of the card's dense bf16 figure that the model's FLOPs take."""
        return self.model_flops / self.seconds / self.assumptions["bf16_flops"] if self.seconds else 0.0

    @classmethod
    def from_json(cls, said: dict) -> "Roofline":
        """Return what `dataclasses.asdict` gave."""
        return cls(**{**said, "work": [Work(**work) for work in said["work"]]})

    def lines(self) -> Iterator[str]:
        """Yield the estimate as lines to read."""
        rate = self.micro_batch_bytes / self.seconds if self.seconds else 0.0
        yield (
            f"roofline (nothing measured, no communication, no gaps): {self.seconds * 1e3:.0f} ms a micro-batch, "
            f"{rate / 1e3:.0f} kB/s, MFU {self.mfu:.0%}; update {self.update_seconds * 1e3:.1f} ms a step"
        )
        for work in self.work:
            share = work.seconds / self.seconds
            if share >= 0.005:
                yield (
                    f"  {work.seconds * 1e3:8.1f} ms {share:6.1%}  {work.kernels:6d} kernels "
                    f"{work.flops / 1e12:8.1f} TFLOP {work.moved_bytes / 1e9:8.1f} GB  {work.what}"
                )
        sent = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in self.sent_bytes.items())
        yield f"  received in a micro-batch, time not estimated: {sent or 'nothing'}"
        yield "  assumed: " + ", ".join(f"{name} {value:g}" for name, value in self.assumptions.items())


def assumptions_of(card: Card) -> dict[str, float]:
    """Return the figures of a card that an estimate rests on."""
    return {
        "bytes_per_s": card.bytes_per_s,
        "bandwidth_share": card.bandwidth_share,
        "bf16_flops": card.bf16_flops,
        "float8_flops": card.float8_flops,
        "matmul_share": card.matmul_share,
        "window_attention_share_forward": card.window_attention_share[0],
        "window_attention_share_backward": card.window_attention_share[1],
        "causal_attention_share_forward": card.causal_attention_share[0],
        "causal_attention_share_backward": card.causal_attention_share[1],
        "launch_s": card.launch_s,
    }
