"""Cached generation against a full forward of the same bytes with the same patches, at every byte."""

import copy

import numpy as np
import pytest
import torch

from blt_titan.byte_vocab import BOS_ID, bytes_to_ids
from blt_titan.hf.verify.verify import TEXT
from blt_titan.inference.cached import CachedBLT
from blt_titan.model.blt import BLT
from blt_titan.patching.rounding import from_storage, to_storage
from blt_titan.patching.rule import PatchRule
from tests.helpers.generating_models import RULES, blt
from tests.helpers.small_entropy_model import model_of, scored_alone

LOGITS_ATOL = 1e-4
"""fp32 sums in another order, over caches whose slots are not in order; seen below 1e-5."""
EDGE_NATS = 1e-4
STEP = {"float16": 2**-9, "uint8": 0.14}
"""Nats, of values up to 4: where rounding may take an entropy across a threshold."""
EDGES_SEEN: list[tuple[PatchRule, int]] = []
MOST_EDGES = 3
"""Among some ten thousand decisions in this file; none was seen."""

CONTENT = bytes_to_ids((TEXT + TEXT[::-1]).encode()).astype(np.int64)


def generator_of(rule: PatchRule, model: BLT, **entropy_changes) -> CachedBLT:
    return CachedBLT(copy.deepcopy(model), rule, model_of(**entropy_changes) if rule.by_entropy else None)


def compare(rule: PatchRule, model: BLT, prompts: list[int], steps: int, **entropy_changes) -> CachedBLT:
    """Read prompts of these lengths and force further bytes; every row's logits are those of its full forward."""
    cached = generator_of(rule, model, **entropy_changes)
    rows = [np.concatenate([[BOS_ID], np.roll(CONTENT, -37 * row)]) for row in range(len(prompts))]
    found = [cached.prefill([ids[:n] for ids, n in zip(rows, prompts, strict=True)])]
    for i in range(steps):
        found.append(cached.step(np.array([ids[n + i] for ids, n in zip(rows, prompts, strict=True)])))
    logits_BTV = torch.stack(found, dim=1)
    for row, (ids, n) in enumerate(zip(rows, prompts, strict=True)):
        ids = ids[: n + steps]
        lengths = cached.patch_lengths(row)
        with torch.no_grad():
            expected = model.logits(torch.from_numpy(ids)[None], torch.tensor([lengths]))[0, n - 1 :]
        assert expected.abs().max() > 1
        torch.testing.assert_close(logits_BTV[row], expected, atol=LOGITS_ATOL, rtol=0)
        check_boundaries(rule, ids, lengths, **entropy_changes)
    return cached


def check_boundaries(rule: PatchRule, ids: np.ndarray, lengths: list[int], **entropy_changes) -> None:
    """The patches are those of the rule on the whole row, unless what decides is at an edge; edges are counted."""
    entropies = scored_alone(model_of(**entropy_changes), ids) if rule.by_entropy else None
    rounded = None if entropies is None else from_storage(to_storage(entropies, rule.storage))
    expected = rule.mark(ids, rounded, include_next=True)
    got = np.zeros(len(ids) + 1, bool)
    got[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = True
    differ = np.flatnonzero(expected != got)
    if not len(differ):
        return
    assert entropies is not None
    # Of the first that differs: later ones may follow from it, where patches are limited.
    before = differ[0] - 1
    rise = entropies[before] - entropies[before - 1]
    decides = {
        "global": [entropies[before] - (rule.threshold or 0)],
        "monotonic": [rise - (rule.threshold or 0)],
        "add": [entropies[before] - (rule.threshold or 0), rise - (rule.threshold_add or 0)],
    }[rule.rule]
    assert min(map(abs, decides)) < STEP[rule.storage] + EDGE_NATS, f"patches differ from position {differ[0]} on"
    EDGES_SEEN.append((rule, int(differ[0])))
    assert len(EDGES_SEEN) <= MOST_EDGES, EDGES_SEEN


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_every_byte_s_logits_are_those_of_the_whole_row(rule):
    cached = compare(rule, blt(), [1], steps=200)

    assert cached.global_steps == cached.ledger.closed[0] - 1 > 5  # BOS was a patch of the prompt


@pytest.mark.parametrize("rule", [RULES["entropy"], RULES["space"]], ids=["entropy", "space"])
def test_prompts_that_end_anywhere(rule):
    """Inside patches, at their first and at their last byte, shorter and longer than the windows."""
    for length in (1, 2, 3, 7, 23, 24, 25, 26, 49, 131, 300):
        cached = compare(rule, blt(), [length], steps=30)
        assert sum(cached.patch_lengths()) == length + 30 + 1


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_prompts_of_other_lengths_side_by_side(rule):
    cached = compare(rule, blt(), [1, 90, 4, 25, 33], steps=60)
    assert [sum(cached.patch_lengths(row)) for row in range(5)] == [62, 151, 65, 86, 94]


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_layers": 2},
        {"encoder_layers": 3, "encoder_cross_attn_all_layers": True},
        {"decoder_cross_attn_all_layers": False, "decoder_layers": 3},
        {"cross_attn_k": 3},
        {"hash_functions": 2, "hash_ngrams": (2, 5), "local_window": 1},
        {"hash_ngrams": (1,), "local_window": 7},
    ],
    ids=str,
)
def test_other_shapes(changes):
    cached = compare(RULES["entropy"], blt(**changes), [3, 40], steps=60)
    assert [sum(cached.patch_lengths(row)) for row in range(2)] == [64, 101]


def test_an_entropy_model_that_forgets_at_newlines():
    cached = compare(RULES["entropy"], blt(), [1, 250, 310], steps=120, reset_at_newline=True)
    assert [sum(cached.patch_lengths(row)) for row in range(3)] == [122, 371, 431]


def test_more_patches_than_a_cache_grows_by():
    cached = compare(RULES["byte"], blt(), [250], steps=300)
    assert cached._global_cache.capacity == 768


def test_positions_beyond_what_angles_are_made_for_at_once():
    cached = compare(RULES["entropy"], blt(), [1, 1010], steps=40)
    assert [sum(cached.patch_lengths(row)) for row in range(2)] == [42, 1051]


def test_a_rule_and_its_model_go_together():
    with pytest.raises(ValueError, match="needs an entropy model"):
        CachedBLT(blt(), RULES["entropy"])
    with pytest.raises(ValueError, match="takes no entropy model"):
        CachedBLT(blt(), RULES["space"], model_of())
