"""Entropy rules: the contract's worked examples, serial twins, causality, errors."""

import numpy as np
import pytest
import torch

from blt_titan.patching import entropy_patch_starts, patch_lengths

H = [5.0, 0.4, 2.0, 0.3, 0.2, 1.9, 1.6, 0.1, 3.0, 0.2]

both_kinds = pytest.mark.parametrize("to_kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])

RULES = {
    "global": {"threshold": 1.0},
    "monotonic": {"threshold": 0.5},
    "add": {"threshold": 1.0, "threshold_add": 0.2},
    "topk": {"patch_size": 3},
}


def serial_starts(h, *, rule, include_next, max_patch_bytes, threshold=None, threshold_add=None):
    """Decide byte by byte, knowing only the entropies of earlier positions."""
    starts, held_since_rule = [], 0
    for j in range(len(h) + include_next):
        if j <= 1:
            by_rule = True
        elif rule == "global":
            by_rule = h[j - 1] > threshold
        elif rule == "monotonic":
            by_rule = j == 2 or h[j - 1] - h[j - 2] > threshold
        elif rule == "add":
            by_rule = j == 2 or (j >= 4 and h[j - 1] > threshold and h[j - 1] - h[j - 2] > threshold_add)
        held_since_rule = 0 if by_rule else held_since_rule + 1
        full = max_patch_bytes is not None and held_since_rule % max_patch_bytes == 0
        starts.append(bool(by_rule or full))
    return starts


def random_entropies(n, seed):
    return np.random.default_rng(seed).gamma(1.5, 0.6, n).astype(np.float16).astype(np.float32)


@both_kinds
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"threshold": 1.335}, [1, 2, 3, 1, 2, 1]),
        ({"threshold": 1.335, "include_next": True}, [1, 2, 3, 1, 2, 2]),
        ({"threshold": 1.335, "rule": "monotonic"}, [1, 1, 1, 3, 3, 1]),
        ({"threshold": 1.335, "rule": "add", "threshold_add": 0.0}, [1, 1, 4, 3, 1]),
        ({"rule": "topk", "patch_size": 2}, [1, 2, 3, 3, 1]),
        ({"threshold": 1.335, "max_patch_bytes": 2}, [1, 2, 2, 1, 1, 2, 1]),
    ],
)
def test_worked_examples(to_kind, options, expected):
    lengths = patch_lengths(to_kind(H), **options)
    assert lengths.tolist() == expected
    assert type(lengths) is type(to_kind(H))
    assert lengths.dtype in (np.int64, torch.int64)


def test_threshold_is_positional_and_a_list_becomes_numpy():
    lengths = patch_lengths(H, 1.335)
    assert isinstance(lengths, np.ndarray)
    assert lengths.tolist() == [1, 2, 3, 1, 2, 1]


@both_kinds
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 400])
@pytest.mark.parametrize("include_next", [False, True])
@pytest.mark.parametrize("max_patch_bytes", [None, 1, 3, 7])
@pytest.mark.parametrize("rule", ["global", "monotonic", "add"])
def test_equals_the_serial_twin(to_kind, n, include_next, max_patch_bytes, rule):
    h = random_entropies(n, seed=n)
    options = RULES[rule] | {"include_next": include_next, "max_patch_bytes": max_patch_bytes}
    starts = entropy_patch_starts(to_kind(h), rule=rule, **options)
    assert starts.tolist() == serial_starts(h, rule=rule, **options)
    assert int(patch_lengths(to_kind(h), rule=rule, **options).sum()) == n + include_next


@both_kinds
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 200])
@pytest.mark.parametrize("patch_size", [1, 2, 5])
@pytest.mark.parametrize("include_next", [False, True])
def test_topk_equals_a_sort_with_ties_to_the_earliest(to_kind, n, patch_size, include_next):
    h = np.random.default_rng(n).integers(0, 6, n).astype(np.float32)  # few values, so many ties
    ranked = sorted(range(1, n if include_next else n - 1), key=lambda i: (-h[i], i))
    chosen = ranked[: max(n // patch_size - 2, 0)]
    expected = [j <= 1 or j - 1 in chosen for j in range(n + include_next)]
    starts = entropy_patch_starts(to_kind(h), rule="topk", patch_size=patch_size, include_next=include_next)
    assert starts.tolist() == expected


@both_kinds
@pytest.mark.parametrize("rule", ["global", "monotonic", "add"])
def test_a_prefix_has_the_same_starts(to_kind, rule):
    h = to_kind(random_entropies(120, seed=1))
    options = RULES[rule] | {"max_patch_bytes": 4}
    full = entropy_patch_starts(h, rule=rule, include_next=True, **options).tolist()
    for n in range(1, 121):
        assert entropy_patch_starts(h[:n], rule=rule, include_next=True, **options).tolist() == full[: n + 1]


@both_kinds
def test_the_comparison_is_strict_and_in_float32(to_kind):
    threshold = 1.1
    rounded = np.float32(threshold)
    above = np.nextafter(rounded, np.float32(9))
    assert threshold < float(rounded) < float(above)  # float64 would find the second value above 1.1
    h = to_kind(np.array([0.0, rounded, above, 0.0], dtype=np.float32))
    for number in (threshold, np.float64(threshold)):  # numpy would compare with the latter in float64
        assert patch_lengths(h, threshold=number).tolist() == [1, 2, 1]
    # In float64 the second value is above the threshold, but both round to the same float32.
    h = to_kind(np.array([0.0, float(rounded) + 1e-9, 0.0, 0.0]))
    assert patch_lengths(h, threshold=float(rounded)).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes_of_torch(dtype):
    assert patch_lengths(torch.tensor(H, dtype=dtype), threshold=1.335).tolist() == [1, 2, 3, 1, 2, 1]


@both_kinds
def test_the_input_is_left_unchanged(to_kind):
    for rule, options in RULES.items():
        h = to_kind(np.array(H, dtype=np.float32))
        entropy_patch_starts(h, rule=rule, max_patch_bytes=2, **options)
        assert h.tolist() == np.array(H, dtype=np.float32).tolist()


@both_kinds
@pytest.mark.parametrize(
    ("h", "options", "message"),
    [
        (
            H,
            {"rule": "median", "threshold": 1.0},
            "rule='median': must be one of global, monotonic, add, topk",
        ),
        (H, {}, "threshold=None: rule='global' needs a number"),
        (H, {"rule": "monotonic"}, "threshold=None: rule='monotonic'"),
        (H, {"rule": "add", "threshold": 1.0}, "threshold_add=None: rule='add'"),
        (H, {"rule": "topk"}, "patch_size=None: rule='topk'"),
        (
            H,
            {"rule": "topk", "patch_size": 2, "threshold": 1.0},
            "threshold=1.0: rule='topk' takes only patch_size",
        ),
        (
            H,
            {"threshold": 1.0, "threshold_add": 0.5},
            "threshold_add=0.5: rule='global' takes only threshold",
        ),
        (H, {"threshold": float("nan")}, "threshold=nan"),
        (H, {"rule": "topk", "patch_size": 0}, "patch_size=0: must be at least 1"),
        (H, {"threshold": 1.0, "max_patch_bytes": 0}, "max_patch_bytes=0: must be at least 1"),
        ([H], {"threshold": 1.0}, r"must be 1-D.*\(1, 10\)"),
        ([], {"threshold": 1.0}, r"at least one position.*\(0,\)"),
    ],
)
def test_errors_say_what_was_given(to_kind, h, options, message):
    with pytest.raises(ValueError, match=message):
        patch_lengths(to_kind(h), **options)


def test_nan_is_refused_in_numpy():
    with pytest.raises(ValueError, match="1 of 3 values are NaN, the first at position 1"):
        patch_lengths([0.0, float("nan"), 1.0], threshold=1.0)


@both_kinds
@pytest.mark.parametrize("include_next", [False, True])
@pytest.mark.parametrize("rule", ["global", "monotonic", "add"])
def test_documents_side_by_side_are_cut_as_alone(to_kind, rule, include_next):
    documents = [random_entropies(n, seed=n) for n in (2, 3, 2, 4, 5, 60, 2, 3)]
    options = RULES[rule] | {"max_patch_bytes": 7}
    begins = np.concatenate([np.arange(len(h)) == 0 for h in documents])
    together = entropy_patch_starts(
        to_kind(np.concatenate(documents)), rule=rule, begins=to_kind(begins), include_next=include_next, **options
    )
    alone = [serial_starts(h, rule=rule, include_next=False, **options) for h in documents[:-1]]
    alone.append(serial_starts(documents[-1], rule=rule, include_next=include_next, **options))
    assert together.tolist() == [start for starts in alone for start in starts]


def test_begins_must_fit():
    h = np.ones(4)
    with pytest.raises(ValueError, match=r"begins: bool of the entropies' shape \(4,\).*got \(3,\)"):
        entropy_patch_starts(h, threshold=1.0, begins=np.ones(3, bool))
    with pytest.raises(ValueError, match="rule='topk'"):
        entropy_patch_starts(h, rule="topk", patch_size=2, begins=np.ones(4, bool))
