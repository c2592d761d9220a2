"""Rules by which patches begin, by name: those that come with the package (`built_in.py`), and those of users.

A rule marks, for each position of a document, whether a patch ends there; the next position then begins one. It must be
causal: what it says of a position may depend on that one and on earlier ones only, because generation meets one byte
after another. A rule of one's own, which ends a patch at each vowel:

    register_rule("vowels", lambda rule, ids, entropies_nats: np.isin(ids - BYTE_OFFSET, list(b"aeiou")))

    ids        <s>  p  a  t  c  h  e  s  </s>
    marked      .   .  *  .  .  .  *  .   .
    patches     1  |2    |4          |2            BOS and EOS always end a patch

From then on `patching.rule = "vowels"` names it, in a run's TOML, in `PatchRule` and `Patcher`, and in checkpoints,
which keep the name alone: whoever reads one registers the rule first. What a name means must never change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET

if TYPE_CHECKING:
    from blt_titan.patching.rule import PatchRule

OPTIONS = ("threshold", "threshold_add", "stride")
"""The fields of `PatchRule` that a rule may use."""

MarkEnds = Callable[["PatchRule", np.ndarray, np.ndarray | None], np.ndarray]
"""From a rule's settings, the ids [N] of a document's beginning (BOS first) and, of rules by entropy, the entropies [N]
after each, fp32 in nats, 0 after BOS and EOS: whether a patch ends at each position, bool [N]."""

MarkAllEnds = Callable[["PatchRule", Any, Any, Any], Any]
"""As `MarkEnds`, of any number of documents one after another, numpy or torch; the last argument says where they begin,
bool [N], or is None for one document."""


class NextBytes(NamedTuple):
    """The next byte of each of several documents, and what a rule may ask of the one before."""

    ids_B: np.ndarray
    """Integers [B]."""
    entropies_B: np.ndarray | None
    """After each, nats, fp32 [B], 0 after BOS and EOS; of rules by entropy only."""
    position_B: np.ndarray
    """Place of each in its document, int64 [B]; BOS is at 0."""
    before_ids_B: np.ndarray
    """Ids of the bytes before, 0 where there is none: integers [B]."""
    before_nats_B: np.ndarray
    """Entropies after the bytes before, 0 after BOS: fp32 [B]."""


MarkNext = Callable[["PatchRule", NextBytes], np.ndarray]
"""Whether a patch ends with the next byte of each document: bool [B]."""


class RuleError(ValueError):
    """A registered rule that returned something else than it should."""


@dataclass(frozen=True)
class RuleKind:
    """What is registered under a name."""

    name: str
    mark_all: MarkAllEnds
    by_entropy: bool
    """Whether it needs entropies."""
    takes: tuple[str, ...]
    """Those of `OPTIONS` that it needs; it refuses the others."""
    mark_next: MarkNext | None
    """The same byte by byte; None if documents are marked anew at each byte."""
    built_in: bool
    origin: str
    """Module and name of the function."""


_KINDS: dict[str, RuleKind] = {}


def register_rule(
    name: str,
    mark_ends: MarkEnds,
    *,
    by_entropy: bool = False,
    takes: Sequence[str] = (),
    mark_next: MarkNext | None = None,
) -> None:
    """Give a rule of one's own a name, for this process; a run does it in the module `experimental.custom_import`.

    Args:
        name: letters, digits and underscores.
        mark_ends: `(rule, ids, entropies_nats) -> bool [N]`, whether a patch ends at each position of one document; a
            pure function, causal. `rule` holds the settings, such as `rule.threshold`; `entropies_nats` is None unless
            `by_entropy`. `max_patch_bytes`, and that patches end at BOS and EOS, are no concern of it.
        by_entropy: whether it needs entropies: a run then needs a sidecar or an entropy model.
        takes: those of the settings `threshold`, `threshold_add` and `stride` that it needs.
        mark_next: the same for the next byte of several documents, so that generation need not mark whole documents
            anew at each byte; it must agree with `mark_ends`.

    Raises:
        ValueError: the name is none, or another rule has it; or `takes` names no setting.
    """

    def mark_all(rule: "PatchRule", ids: Any, entropies_nats: Any, begins: Any) -> np.ndarray:
        return _mark_one_by_one(name, mark_ends, rule, ids, entropies_nats, begins)

    def mark_next_checked(rule: "PatchRule", at: NextBytes) -> np.ndarray:
        assert mark_next is not None
        special = at.ids_B < BYTE_OFFSET
        if at.entropies_B is not None:
            at = at._replace(
                entropies_B=_without_special(at.ids_B, at.entropies_B),
                before_nats_B=_without_special(at.before_ids_B, at.before_nats_B),
            )
        return _checked(name, mark_next(rule, at), len(at.ids_B)) | special

    origin = f"{mark_ends.__module__}.{getattr(mark_ends, '__qualname__', type(mark_ends).__name__)}"
    # The same function once more, as a notebook's cell that runs again registers it.
    if (known := _KINDS.get(name)) is not None and (known.built_in or known.origin != origin):
        raise ValueError(f"rule = {name!r}: is registered already, by {known.origin}; choose another name")
    by_byte = None if mark_next is None else mark_next_checked
    _register(RuleKind(name, mark_all, by_entropy, tuple(takes), by_byte, False, origin))


def register_built_in(
    name: str,
    mark_all: MarkAllEnds,
    mark_next: MarkNext,
    *,
    by_entropy: bool = False,
    takes: Sequence[str] = (),
) -> None:
    """Register a rule that marks any number of documents at once, on numpy and torch alike."""
    origin = f"{mark_all.__module__}.{mark_all.__qualname__}"
    _register(RuleKind(name, mark_all, by_entropy, tuple(takes), mark_next, True, origin))


def rule_kind(name: str) -> RuleKind:
    """Return what is registered under a name.

    Raises:
        ValueError: nothing is.
    """
    if (found := _KINDS.get(name)) is None:
        raise ValueError(f"rule = {name!r}: {unregistered()}")
    return found


def is_registered(name: object) -> bool:
    """Tell whether a rule has this name."""
    return isinstance(name, str) and name in _KINDS


def built_in_names() -> list[str]:
    """Return the names of the rules that come with the package."""
    return [name for name, kind in _KINDS.items() if kind.built_in]


def unregistered() -> str:
    """Say what a name that nothing is registered under may be."""
    return (
        f"must be one of {', '.join(map(repr, _KINDS))}, which are registered; what registers another one is imported "
        "first (by a run: experimental.custom_import = 'module', by a command: --import module)"
    )


def _register(kind: RuleKind) -> None:
    if not kind.name.isidentifier():
        raise ValueError(f"rule = {kind.name!r}: a name is made of letters, digits and underscores")
    if unknown := [option for option in kind.takes if option not in OPTIONS]:
        raise ValueError(f"rule = {kind.name!r} takes {unknown[0]!r}: it may take {', '.join(OPTIONS)}")
    _KINDS[kind.name] = kind


def _mark_one_by_one(
    name: str, mark_ends: MarkEnds, rule: "PatchRule", ids: np.ndarray, entropies_nats: Any, begins: Any
) -> np.ndarray:
    """Ask a user's rule about each document alone, so that none can depend on its neighbours; check what it returns."""
    if entropies_nats is not None:
        entropies_nats = _without_special(ids, entropies_nats)
    first = np.flatnonzero(ids == BOS_ID if begins is None else begins)
    borders = np.unique(np.concatenate([[0], first, [len(ids)]])).tolist()
    ends = ids < BYTE_OFFSET
    for begin, end in pairwise(borders):
        entropies = None if entropies_nats is None else entropies_nats[begin:end]
        ends[begin:end] |= _checked(name, mark_ends(rule, ids[begin:end], entropies), end - begin)
    return ends


def _without_special(ids: np.ndarray, entropies_nats: np.ndarray) -> np.ndarray:
    """Put 0 after BOS and EOS, as in sidecars, which have an entropy for each byte of text and none for those."""
    return np.where(ids < BYTE_OFFSET, 0, entropies_nats).astype(np.float32)


def _checked(name: str, returned: Any, n_ids: int) -> np.ndarray:
    marked = np.asarray(returned)
    if marked.dtype != np.bool_ or marked.shape != (n_ids,):
        raise RuleError(
            f"rule = {name!r}: returned {marked.dtype} of shape {marked.shape} for {n_ids} ids, expected a bool for "
            "each"
        )
    return marked
