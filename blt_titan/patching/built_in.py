"""The rules that come with the package, registered by importing this module: each for whole documents and by byte.

What a rule means stands in `text.py` and `entropy.py`; here each is said once more for the next byte alone. Both must
agree, and `tests/patching/test_rule.py` compares them.
"""

from typing import Any

import numpy as np

from blt_titan.byte_vocab import BYTE_OFFSET
from blt_titan.patching.entropy import entropy_patch_ends
from blt_titan.patching.registry import NextBytes, register_built_in
from blt_titan.patching.text import byte_patch_ends, space_like_ids, space_patch_ends, static_patch_ends


def _space(rule: Any, ids: Any, entropies_nats: Any, begins: Any) -> Any:
    return space_patch_ends(ids)


def _next_space(rule: Any, at: NextBytes) -> np.ndarray:
    return (at.ids_B < BYTE_OFFSET) | (space_like_ids(at.ids_B) & ~space_like_ids(at.before_ids_B))


def _static(rule: Any, ids: Any, entropies_nats: Any, begins: Any) -> Any:
    return static_patch_ends(ids, stride=rule.stride)


def _next_static(rule: Any, at: NextBytes) -> np.ndarray:
    return (at.ids_B < BYTE_OFFSET) | (at.position_B % rule.stride == 0)


def _byte(rule: Any, ids: Any, entropies_nats: Any, begins: Any) -> Any:
    return byte_patch_ends(ids)


def _next_byte(rule: Any, at: NextBytes) -> np.ndarray:
    return np.ones(len(at.ids_B), bool)


def _by_entropy(rule: Any, ids: Any, entropies_nats: Any, begins: Any) -> Any:
    return entropy_patch_ends(
        entropies_nats, rule=rule.rule, threshold=rule.threshold, threshold_add=rule.threshold_add, begins=begins
    )


# Thresholds are Python floats, as in `entropy_patch_ends`, so that the comparisons are in float32.


def _next_global(rule: Any, at: NextBytes) -> np.ndarray:
    assert at.entropies_B is not None
    return (at.entropies_B > float(rule.threshold)) | (at.position_B == 0)


def _next_monotonic(rule: Any, at: NextBytes) -> np.ndarray:
    assert at.entropies_B is not None
    rises = at.entropies_B - at.before_nats_B
    return (rises > float(rule.threshold)) | (at.position_B <= 1)


def _next_add(rule: Any, at: NextBytes) -> np.ndarray:
    assert at.entropies_B is not None
    rises = at.entropies_B - at.before_nats_B
    ends = (at.entropies_B > float(rule.threshold)) & (rises > float(rule.threshold_add))
    return (ends & (at.position_B != 2)) | (at.position_B <= 1)


register_built_in("space", _space, _next_space)
register_built_in("static", _static, _next_static, takes=("stride",))
register_built_in("byte", _byte, _next_byte)
register_built_in("global", _by_entropy, _next_global, by_entropy=True, takes=("threshold",))
register_built_in("monotonic", _by_entropy, _next_monotonic, by_entropy=True, takes=("threshold",))
register_built_in("add", _by_entropy, _next_add, by_entropy=True, takes=("threshold", "threshold_add"))
