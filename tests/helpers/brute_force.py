"""Generation and scoring without caches: the whole row again for each byte, one window after the other."""

import dataclasses

import numpy as np
import torch

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET, EOS_ID, bytes_to_ids
from blt_titan.inference.generate import generate
from blt_titan.inference.sample import Sampling
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rounding import from_storage, to_storage
from blt_titan.patching.rule import PatchRule
from tests.helpers.generating_models import blt
from tests.helpers.small_entropy_model import model_of, scored_alone

GREEDY = Sampling(temperature=0)


def complete(
    model, prompt: bytes, rule: PatchRule, *, entropy_model=None, max_bytes: int, sampling: Sampling | None = None
) -> bytes:
    """`generate`, by the settings that the twin takes."""
    return generate(
        model,
        prompt,
        rule=rule,
        entropy_model=entropy_model,
        max_bytes=max_bytes,
        **dataclasses.asdict(sampling or Sampling()),
    )


def recomputed(model, prompt: bytes, rule: PatchRule, max_bytes: int, sampling: Sampling) -> bytes:
    """The brute-force twin: the whole row again for each byte."""
    draw = torch.Generator().manual_seed(sampling.seed)
    ids = np.concatenate([[BOS_ID], bytes_to_ids(prompt)])
    out = b""
    while len(out) < max_bytes:
        lengths = torch.from_numpy(starts_to_lengths(rule.mark(ids, include_next=True)))
        with torch.no_grad():
            logits = model.logits(torch.from_numpy(ids)[None], lengths[None])[:, -1]
        chosen = int(torch.multinomial(sampling.probabilities(logits)[0], 1, generator=draw))
        if chosen == EOS_ID:
            break
        ids, out = np.append(ids, chosen), out + bytes([chosen - BYTE_OFFSET])
    return out


def by_hand(ids: np.ndarray, rule, context: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """One window after the other, one row each."""
    entropies = from_storage(to_storage(scored_alone(model_of(), ids), rule.storage)) if rule.by_entropy else None
    marked = rule.mark(ids[:-1], None if entropies is None else entropies[:-1], include_next=True)
    nats, likeliest = np.full(len(ids) - 1, np.nan), np.zeros(len(ids) - 1, bool)
    begin = scored = 0
    while scored < len(ids) - 1:
        end = min(len(ids) - 1, begin + context)
        starts = marked[begin : end + 1].copy()
        starts[:2] = True
        with torch.no_grad():
            row, lengths = torch.from_numpy(ids[begin:end])[None], torch.from_numpy(starts_to_lengths(starts))[None]
            logits = blt().logits(row, lengths)[0]
        log_p = logits.log_softmax(-1).numpy()
        allowed = [EOS_ID, *range(BYTE_OFFSET, 260)]
        for i in range(scored, end):
            target = ids[i + 1]
            nats[i] = -log_p[i - begin, target]
            likeliest[i] = allowed[int(log_p[i - begin, allowed].argmax())] == target
        scored, begin = end, begin + stride
    return nats, likeliest
