"""Sample bytes from a cached BLT, for several prompts at once.

    generator = CachedBLT(model, rule, entropy_model)
    for step in sample_steps(generator, [b"def ", b"import "], max_bytes=64, sampling=Sampling(temperature=0.7)):
        ...                                      # [102, 115], [105, 121], ..., None where a row has ended

The rule that decides where patches begin is the one of training, and it decides from the bytes so far; so what is
sampled is what the trained model says.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE, bytes_to_ids
from blt_titan.inference.cached import CachedBLT

LEAST_TEMPERATURE = 1e-6
"""Below it logits would overflow; 0 is greedy."""


@dataclass(frozen=True)
class Sampling:
    """How the next byte is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest byte."""
    top_k: int | None = None
    """Choose among so many of the likeliest bytes; None for all."""
    top_p: float | None = None
    """Choose among the likeliest bytes that together have this probability; None for all."""
    seed: int = 0
    """Row r of a batch draws from a generator of its own, seeded seed + r, so that rows do not depend on each other."""

    def __post_init__(self):
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: must be 0, or finite and at least {LEAST_TEMPERATURE}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: must be from 0 to 2**63 - 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be above 0, at most 1")

    def probabilities(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the distribution to draw from, fp32 [B, V]; special ids but EOS have none.

        Bytes that tie with the last of `top_k` are all kept.
        """
        allowed_V = torch.arange(VOCAB_SIZE, device=logits_BV.device)
        allowed_V = (allowed_V >= BYTE_OFFSET) | (allowed_V == EOS_ID)
        logits_BV = logits_BV.float().masked_fill(~allowed_V, -torch.inf)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits_BV.argmax(-1), VOCAB_SIZE).float()
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < VOCAB_SIZE:
            least_B1 = logits_BV.topk(self.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        p_BV = logits_BV.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            sorted_BV, order_BV = p_BV.sort(-1, descending=True)
            # A byte is kept if those before it do not reach top_p yet.
            kept_BV = (sorted_BV.cumsum(-1) - sorted_BV) < self.top_p
            kept_BV[:, 0] = True  # whatever becomes of a tiny top_p in fp32
            p_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, sorted_BV * kept_BV)
            p_BV = p_BV / p_BV.sum(-1, keepdim=True)
        return p_BV


def sample_steps(
    generator: CachedBLT,
    prompts: Sequence[bytes],
    *,
    max_bytes: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts, each until EOS or `max_bytes`.

    Args:
        generator: reads the prompts anew.
        prompts: beginnings of documents; may be empty.
        max_bytes: bytes to sample at most, for each.
        sampling: default: at temperature 1.
        seeds: of each row; default the sampling's, and those after it.

    Yields:
        The next byte of each row, 0 to 255; None where a row has ended. It ends when all have.
    """
    sampling = sampling or Sampling()
    seeds = range(sampling.seed, sampling.seed + len(prompts)) if seeds is None else seeds
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    logits_BV = generator.prefill([np.concatenate([[BOS_ID], bytes_to_ids(prompt)]) for prompt in prompts])
    ended = np.zeros(len(prompts), bool)
    for number in range(max_bytes):
        p_BV = sampling.probabilities(logits_BV).cpu()
        ids = np.array([int(torch.multinomial(p, 1, generator=draw)) for p, draw in zip(p_BV, draws, strict=True)])
        ended |= ids == EOS_ID
        if ended.all():
            return
        yield [None if end else int(i) - BYTE_OFFSET for i, end in zip(ids, ended, strict=True)]
        if number + 1 < max_bytes:
            logits_BV = generator.step(ids)


class TextStream:
    """Bytes in, valid text out: a character leaves when its last byte has come; what is not UTF-8 becomes U+FFFD."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, content: bytes) -> str:
        """Return the text that is complete now."""
        return self._decoder.decode(content)

    def end(self) -> str:
        """Return what is left."""
        return self._decoder.decode(b"", final=True)
