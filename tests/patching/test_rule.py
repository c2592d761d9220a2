"""The rule as one value: byte by byte it cuts as it does whole documents."""

import numpy as np
import pytest

from blt_titan.byte_vocab import document_ids
from blt_titan.patching.rule import PatchCursor, PatchRule

RULES = [
    PatchRule("space"),
    PatchRule("space", max_patch_bytes=3),
    PatchRule("static", stride=4),
    PatchRule("static", stride=5, max_patch_bytes=2),
    PatchRule("byte"),
    PatchRule("global", threshold=1.5),
    PatchRule("global", threshold=1.5, max_patch_bytes=1),
    PatchRule("global", threshold=2.9, max_patch_bytes=7),
    PatchRule("monotonic", threshold=0.3),
    PatchRule("monotonic", threshold=1.9, max_patch_bytes=4),
    PatchRule("add", threshold=1.0, threshold_add=0.2),
    PatchRule("add", threshold=2.5, threshold_add=0.5, max_patch_bytes=6),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_cursor_ends_patches_where_the_whole_document_does(rule: PatchRule):
    rng = np.random.default_rng(0)
    rows, length = 40, 60
    text = rng.choice(np.frombuffer(b"abc  ,.\xc3\xa9\xe2\x82\xac0Z\n", np.uint8), (rows, length))
    ids = np.stack([document_ids(row.tobytes()) for row in text])
    entropies = rng.uniform(0, 3, ids.shape).astype(np.float16).astype(np.float32)
    # Ties with the threshold and between neighbours, which are not above and do not rise.
    entropies[rng.random(ids.shape) < 0.2] = np.float32(rule.threshold or 0)
    cursor = PatchCursor(rule, rows)
    ends = np.stack([cursor.ends(ids[:, i], entropies[:, i]) for i in range(ids.shape[1])], axis=1)
    for row in range(rows):
        marked = rule.mark(ids[row], entropies[row], include_next=True)
        assert (ends[row] == marked[1:]).all()
    assert 0 < ends.mean() < 1 or rule.rule == "byte" or rule.max_patch_bytes == 1


def test_fields_are_those_of_the_configuration():
    rule = PatchRule("add", threshold=1.0, threshold_add=0.25, max_patch_bytes=9)
    assert PatchRule.of(rule.as_dict() | {"sidecar": "default"}) == rule
    assert PatchRule.of(rule) == rule


def test_a_rule_that_looks_ahead_is_not_registered():
    with pytest.raises(ValueError, match="topk"):
        PatchCursor(PatchRule("topk"))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_that_cuts_has_no_fault(rule: PatchRule):
    assert list(rule.faults()) == []


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (PatchRule("space", stride=4), ["patching.stride = 4: 'space' takes no stride"]),
        (PatchRule("static"), ["patching.stride = None: 'static' needs a stride"]),
        (PatchRule("static", stride=0), ["patching.stride = 0: 'static' needs a stride"]),
        (PatchRule("global"), ["rule = 'global' needs patching.threshold, in nats"]),
        (PatchRule("global", threshold=float("nan")), ["patching.threshold = nan: must be a finite number"]),
        (PatchRule("add"), ["needs patching.threshold,", "needs patching.threshold_add,"]),
        (
            PatchRule("byte", threshold=1.0, threshold_add=1.0),
            ["takes no patching.threshold,", "patching.threshold_add"],
        ),
        (PatchRule("space", max_patch_bytes=0), ["patching.max_patch_bytes = 0: must be at least 1"]),
        (PatchRule("topk"), ["patching.rule = 'topk': must be one of 'space', 'static'"]),
        (
            PatchRule("global", stride=2, max_patch_bytes=-1),
            ["stride = 2", "patching.threshold", "max_patch_bytes = -1"],
        ),
    ],
    ids=str,
)
def test_faults_name_the_fields(rule, named):
    faults = list(rule.faults("patching."))
    assert len(faults) == len(named)
    for sentence, words in zip(faults, named, strict=True):
        assert words in sentence
