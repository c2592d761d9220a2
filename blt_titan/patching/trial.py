"""A trial of a registered rule on a fixed text, before anything is trained on its patches.

What cannot be seen from outside is tried: whether the rule returns what it should, whether it is causal (the beginning
of a document is cut as it is in the whole one), and whether it answers the same byte by byte.
"""

from collections.abc import Iterator

import numpy as np

from blt_titan.byte_vocab import document_ids
from blt_titan.patching.registry import rule_kind
from blt_titan.patching.rule import PatchCursor, PatchRule

_TEXT = "To be, or not to be: that is the question.\n    x = f(3.14)  # Größe, 日本語\n".encode()


def trial_faults(rule: PatchRule) -> Iterator[str]:
    """Yield what is wrong with a rule of the user's; nothing for those that come with the package.

    Args:
        rule: sound by itself (`PatchRule.faults`).
    """
    if rule_kind(rule.rule).built_in:
        return
    ids = document_ids(_TEXT)
    entropies = None
    if rule.by_entropy:
        entropies = rule.rounded(np.random.default_rng(0).uniform(0, 4, len(ids)).astype(np.float32))
    try:
        yield from _differences(rule, ids, entropies)
    except Exception as error:  # whatever a function of the user's raises
        yield f"rule = {rule.rule!r}: fails on a text of {len(_TEXT)} bytes ({type(error).__name__}: {error})"


def _differences(rule: PatchRule, ids: np.ndarray, entropies: np.ndarray | None) -> Iterator[str]:
    whole = rule.mark(ids, entropies, include_next=True)
    for n in range(1, len(ids)):
        beginning = rule.mark(ids[:n], None if entropies is None else entropies[:n], include_next=True)
        if not np.array_equal(beginning, whole[: n + 1]):
            yield (
                f"rule = {rule.rule!r}: is not causal: {n} ids of a document are cut otherwise alone than in the whole "
                "one; what it returns for a position may depend on that one and on earlier ones only"
            )
            return
    cursor = PatchCursor(rule)
    for i in range(len(ids)):
        ends = cursor.ends(ids[i : i + 1], None if entropies is None else entropies[i : i + 1])
        if bool(ends[0]) != bool(whole[i + 1]):
            yield f"rule = {rule.rule!r}: mark_next and mark_ends differ at position {i} of a document"
            return
