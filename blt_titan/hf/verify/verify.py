"""Compare an exported directory with what it was made from, and with what `transformers` computes from it."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn as nn

from blt_titan.hf.export import Weights, check_names
from blt_titan.hf.model_card import OLDEST_TRANSFORMERS
from blt_titan.hf.names import blt_name_to_hf, entropy_name_to_hf
from blt_titan.hf.pretrained import BLT, ByteTokenizer, EntropyModel, Pretrained
from blt_titan.hf.verify.transformers_order import FloatsAre, in_transformers_order
from blt_titan.layout import layout_without_patches
from blt_titan.model.blt import BLT as BareBLT
from blt_titan.model.entropy_model import EntropyModel as BareEntropyModel
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rounding import decision_edge
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer, entropy_nats

LOGITS_ATOL = 1e-5
"""Of logits in fp32, with the order of operations of transformers on both sides. They then round alike: 0 is usual."""
FLOAT64_RTOL = 1e-9
"""Of logits in fp64, each in its own order, times the largest where that is above 1. One function leaves 1e-13; a
single step of it in fp32 leaves 1e-8 and more."""
ROUNDING_RATIO = 2.0
"""Our logits in fp32, in our own order, may lie this many times further from those in fp64 than dense masks and sums
in turn leave them, as root of mean squares. How far that is, is up to the weights, which amplify rounding; 162 small
random models gave ratios of 0.7 to 1.5, a step cut to 16 bits up to 30, to 12 bits from 15 to 500."""
EDGE_NATS = 1e-4
"""Two fp32 computations of an entropy may fall on two sides of a decision edge that is nearer than this, or than
twice what fp32 does to the entropies of transformers."""
TEXT = (
    "The original idea of the patch is that bytes are not equally hard to foresee: the first letter of a word is, the "
    "rest of it hardly. So a model may spend its large transformer where it matters.\n\n"
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "Größe, élan, 日本語, 🎉: some bytes of these never come alone. 0123456789 3.14159265358979 x = [1, 2, 3]\r\n\t"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n"
    "A window of five hundred and twelve bytes ends before this sentence does, which is why the text goes on a little "
    "longer than one would expect of an example, so that an attention without a window would be found out."
)


ResultT = TypeVar("ResultT")


class VerificationError(ValueError):
    """An exported directory that is not what it should be; says in what."""


@dataclass(frozen=True)
class Verification:
    """What was compared."""

    release: str
    """Of `transformers`."""
    tensors: int
    dtype: str
    """Of the weights; the rest is computed from them in fp32 and fp64."""
    largest_logit: float
    same_order_error: float
    """Largest difference to the logits of `transformers` in fp32, with our patches and its order of operations."""
    own_order_error: float
    """The same, each in its own order: rounding, and the angles that `transformers` makes in fp32."""
    float64_error: float
    """The same in fp64: whether the two are one function."""
    our_rounding: float
    """Largest difference of our logits in fp32 to those in fp64."""
    their_rounding: float
    """The same of those of `transformers`."""
    boundaries: int
    boundaries_at_edges: int
    """That differ, all at decision edges."""
    own_patches: bool
    """Whether `transformers` also cut the text itself, and gave the same logits."""

    def __str__(self) -> str:
        lines = [
            f"{self.tensors} tensors ({self.dtype}) are those of the checkpoint",
            f"logits (up to {self.largest_logit:.1f}) of transformers {self.release} and ours differ by "
            f"{self.same_order_error:.1e} in fp32 with one order of operations, by {self.own_order_error:.1e} with "
            f"each one's own ({self.their_rounding:.1e} and {self.our_rounding:.1e} from fp64), and by "
            f"{self.float64_error:.1e} in fp64",
        ]
        if self.boundaries:
            own = "gives the same logits with its own" if self.own_patches else "was not compared with its own"
            lines.append(
                f"{self.boundaries} patch boundaries, {self.boundaries_at_edges} of them differ, at decision edges; "
                f"transformers {own}"
            )
        return "; ".join(lines)


def verify_export(
    directory: str | os.PathLike[str], blt: Weights, entropy: Weights | None, *, text: str | None = None
) -> Verification:
    """Compare a directory with the weights that it was written from, and its model with ours.

    Logits are compared in fp32 with the operations of both in one order, where they must be the same within 1e-5, and
    in fp64, where rounding hides nothing. In fp32 with each one's own order the difference is told, and ours is held
    to what rounding can do. One model is in memory at a time: 8 bytes per parameter and 4 more of the largest tensor.

    Args:
        directory: written by `export_hf`.
        blt: what the BLT was written from.
        entropy: what the patcher was written from, if it has one.
        text: what both models read; by default one that is longer than their windows.

    Raises:
        VerificationError: something differs; says what.
        ImportError: transformers is not installed.
    """
    directory = Path(directory)
    release = _release()
    pretrained = Pretrained(directory)
    inside = entropy if pretrained.has_entropy_model else None
    _compare_settings(pretrained, blt, inside)
    tensors = _compare_tensors(pretrained, blt, inside)
    text = longer_than_windows(pretrained) if text is None else text
    ids = ByteTokenizer().encode(text)
    cut = _cut(pretrained, np.array(ids))
    theirs = _compute_theirs(pretrained, text, ids, cut)
    boundaries = _Boundaries()
    if cut.nats is not None:
        boundaries = _compare_boundaries(pretrained, np.array(ids), cut, theirs)

    ours = BLT.from_pretrained(directory)
    ids_1S, lengths_1P = torch.tensor([ids]), torch.from_numpy(cut.lengths)[None]
    ordered = in_transformers_order(ours)
    with torch.no_grad():
        dense = ordered.logits(ids_1S, lengths_1P)
        with FloatsAre(torch.float32):
            same_order = ordered.logits(ids_1S, lengths_1P)
    fp32, fp64 = _both_precisions(ours, lambda: ours.logits(ids_1S, lengths_1P))

    largest = float(fp64.abs().max())
    scale = max(1.0, largest)
    float64_error = _largest_difference(fp64, theirs.logits[1])
    if not float64_error <= FLOAT64_RTOL * scale:
        raise VerificationError(
            f"{directory}: logits computed in fp64 differ by {float64_error:.1e}, allowed are "
            f"{FLOAT64_RTOL * scale:.1e} (transformers {release})"
        )
    same_order_error = _largest_difference(same_order, theirs.logits[0])
    if not same_order_error <= LOGITS_ATOL:
        raise VerificationError(
            f"{directory}: logits in fp32 differ by {same_order_error:.1e}, allowed are {LOGITS_ATOL:.1e}, though both "
            f"compute in one order. Those in fp64 agree within {float64_error:.1e}, so the weights are right, and "
            f"transformers {release} has another order of operations than blt_titan/hf/verify/transformers_order.py"
        )
    if boundaries.same:
        assert theirs.alone is not None
        alone_error = _largest_difference(same_order, theirs.alone)
        if not alone_error <= LOGITS_ATOL:
            raise VerificationError(
                f"{directory}: transformers cuts the text as we do, but its logits then differ by {alone_error:.1e}, "
                f"allowed are {LOGITS_ATOL:.1e}; with our patches given it is {same_order_error:.1e}"
            )
    our_rounding, least = _root_mean_square(fp32, fp64), torch.finfo(torch.float32).eps * scale
    allowed = ROUNDING_RATIO * max(_root_mean_square(dense, fp64), least)
    if not our_rounding <= allowed:
        raise VerificationError(
            f"{directory}: our logits in fp32 are {our_rounding:.1e} (root of mean squares) from those in fp64, "
            f"allowed are {allowed:.1e}, {ROUNDING_RATIO:g} times what dense masks and sums in turn leave: a fault in "
            "blt_titan, not in the export"
        )
    return Verification(
        release=release,
        tensors=tensors,
        dtype=pretrained.dtype,
        largest_logit=largest,
        same_order_error=same_order_error,
        own_order_error=_largest_difference(fp32, theirs.logits[0]),
        float64_error=float64_error,
        our_rounding=_largest_difference(fp32, fp64),
        their_rounding=_largest_difference(*theirs.logits),
        boundaries=boundaries.count,
        boundaries_at_edges=boundaries.differ,
        own_patches=boundaries.same,
    )


def _release() -> str:
    import transformers
    from packaging.version import Version

    release = transformers.__version__
    if Version(release) < Version(OLDEST_TRANSFORMERS):
        raise VerificationError(
            f"transformers {release} attends without a window and cannot be compared with; {OLDEST_TRANSFORMERS} is "
            "the oldest that can"
        )
    return release


def longer_than_windows(pretrained: Pretrained) -> str:
    """Return a text in which every window, of a directory's models, ends before the text does."""
    windows = [pretrained.blt_args.local_window]
    if pretrained.has_entropy_model:
        windows.append(pretrained.entropy_args.window)
    return TEXT * (1 + max(windows) // len(TEXT))


class _Cut(NamedTuple):
    """How we cut the text; of positions that may begin a patch there is one more than there are ids."""

    lengths: np.ndarray
    """Of patches, int64 [P]."""
    starts: np.ndarray
    """The same, bool [N + 1]."""
    nats: np.ndarray | None = None
    """Entropies, fp32 [N]; None without an entropy model, where any patches will do."""
    entropy_logits: torch.Tensor | None = None
    """Of the entropy model, in fp64 [1, N, V]."""


def _cut(pretrained: Pretrained, ids: np.ndarray) -> _Cut:
    if not pretrained.has_entropy_model:
        starts = PatchRule("space", max_patch_bytes=16).mark(ids, include_next=True)
        return _Cut(starts_to_lengths(starts), starts)
    assert pretrained.rule is not None
    nats = EntropyScorer(EntropyModel.from_pretrained(pretrained.directory), lanes=1).score(ids)
    starts = pretrained.rule.mark(ids, pretrained.rule.rounded(nats), include_next=True)
    model = EntropyModel.from_pretrained(pretrained.directory).double()
    ids_1N = torch.from_numpy(ids)[None]
    with torch.no_grad(), FloatsAre(torch.float64):
        logits = model(ids_1N, layout_without_patches(torch.zeros_like(ids_1N)))
    return _Cut(starts_to_lengths(starts), starts, nats, logits)


class _Theirs(NamedTuple):
    """What `transformers` computes of the text."""

    logits: tuple[torch.Tensor, torch.Tensor]
    """With our patches, in fp32 and fp64, [1, N, V]."""
    alone: torch.Tensor | None = None
    """With its own, in fp32."""
    starts: np.ndarray | None = None
    """Of its own patches, bool [N + 1]."""
    entropy_logits: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of its patcher, in fp32 and fp64, [1, N, V]."""


def _compute_theirs(pretrained: Pretrained, text: str, ids: list[int], cut: _Cut) -> _Theirs:
    import transformers

    directory = pretrained.directory
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    model = model.eval()
    if info["missing_keys"] or info["unexpected_keys"]:
        raise VerificationError(
            f"{directory}: transformers misses {info['missing_keys']}, does not know {info['unexpected_keys']}"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if tokenizer(text)["input_ids"] != ids or tokenizer.decode(ids, skip_special_tokens=True) != text:
        raise VerificationError(f"{directory}: AutoTokenizer does not give the bytes of a text")
    ids_1N, lengths_1P = torch.tensor([ids]), torch.from_numpy(cut.lengths)[None]

    def logits() -> torch.Tensor:
        return model(ids_1N, patch_lengths=lengths_1P, use_cache=False).logits

    if cut.nats is None:
        return _Theirs(_both_precisions(model, logits))

    def cut_by_itself() -> tuple[torch.Tensor, torch.Tensor]:
        config = model.config
        _, lengths, entropy_logits = model.model.patcher(
            ids_1N, patch_size=config.patch_size, threshold=config.patching_threshold
        )
        return lengths, entropy_logits

    with torch.no_grad():
        alone = model(ids_1N, use_cache=False).logits
    fp32, fp64 = _both_precisions(model, lambda: (logits(), *cut_by_itself()))
    starts = np.zeros(len(ids) + 1, bool)
    starts[np.cumsum(np.concatenate([[0], fp32[1][0].long().numpy()[:-1]]))] = True
    return _Theirs((fp32[0], fp64[0]), alone, starts, (fp32[2], fp64[2]))


def _both_precisions(model: nn.Module, compute: Callable[[], ResultT]) -> tuple[ResultT, ResultT]:
    """Compute with a model in fp32, then in fp64, in which it stays."""
    with torch.no_grad():
        fp32 = compute()
        model.double()
        with FloatsAre(torch.float64):
            for module in model.modules():
                # transformers keeps the frequencies of its rotary angles, rounded to fp32 when they were made.
                if hasattr(module, "inv_freq"):
                    module.inv_freq = type(module)(module.config).inv_freq
            return fp32, compute()


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _root_mean_square(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def _compare_settings(pretrained: Pretrained, blt: Weights, entropy: Weights | None) -> None:
    """Compare what config.json says with what the checkpoint says: both models are built from the former."""
    pairs: list[tuple[str, Any, Any]] = [("", pretrained.blt_args, blt.args)]
    if entropy is not None:
        pairs.append(("entropy model ", pretrained.entropy_args, entropy.args))
    if blt.rule is not None and pretrained.rule is not None:
        pairs.append(("patching ", pretrained.rule, blt.rule))
    for what, written, meant in pairs:
        for key, value in asdict(meant).items():
            found = asdict(written)[key]
            if key not in _NOT_WRITTEN and found != value:
                raise VerificationError(
                    f"{pretrained.directory}/config.json: {what}{key} is {found!r}, the checkpoint's {value!r}"
                )


_NOT_WRITTEN = ("init_seed", "init_depth_scaling", "attention_backend", "nominal_patch_bytes")
"""What changes neither weights nor what is computed with them."""


def _compare_tensors(pretrained: Pretrained, blt: Weights, entropy: Weights | None) -> int:
    models: list[tuple[Weights, Any, Callable[[str], str], torch.dtype]]
    models = [(blt, BareBLT, blt_name_to_hf, getattr(torch, pretrained.dtype))]
    if entropy is not None:
        models.append((entropy, BareEntropyModel, entropy_name_to_hf, torch.float32))
    count = 0
    for weights, kind, translate, dtype in models:
        for name in check_names(weights, kind):
            written = pretrained.tensor(translate(name))
            if written.dtype != dtype:
                raise VerificationError(f"{pretrained.directory}: {translate(name)} is {written.dtype}, not {dtype}")
            # Not read as the export reads it, in blocks of rows.
            if not torch.equal(written, weights.tensors.whole(name).to(dtype)):
                raise VerificationError(f"{pretrained.directory}: {translate(name)} is not what {weights.origin} holds")
            count += 1
    return count


class _Boundaries(NamedTuple):
    count: int = 0
    differ: int = 0
    same: bool = False
    """Whether transformers cuts exactly where we do."""


def _compare_boundaries(pretrained: Pretrained, ids: np.ndarray, cut: _Cut, theirs: _Theirs) -> _Boundaries:
    directory, rule = pretrained.directory, pretrained.rule
    assert rule is not None
    assert cut.nats is not None
    assert cut.entropy_logits is not None
    assert theirs.entropy_logits is not None
    allowed = FLOAT64_RTOL * max(1.0, float(cut.entropy_logits.abs().max()))
    float64_error = _largest_difference(cut.entropy_logits, theirs.entropy_logits[1])
    if not float64_error <= allowed:
        raise VerificationError(
            f"{directory}: logits of the entropy model computed in fp64 differ by {float64_error:.1e}, allowed are "
            f"{allowed:.1e}"
        )
    fp32, fp64 = (entropy_nats(logits[0]) for logits in theirs.entropy_logits)
    near = max(EDGE_NATS, 2 * _largest_difference(fp32, fp64))
    error = _largest_difference(fp32, torch.from_numpy(cut.nats))
    if not error <= near:
        raise VerificationError(f"{directory}: entropies differ by {error:.1e} nats, allowed are {near:.1e}")
    # transformers splits no long patches, so what is compared is the rule without its limit.
    starts = replace(rule, max_patch_bytes=None).mark(ids, rule.rounded(cut.nats), include_next=True)
    differ = np.flatnonzero(starts != theirs.starts)
    low, high = decision_edge(float(rule.threshold or 0), rule.storage)
    if any(not low - near <= cut.nats[i - 1] <= high + near for i in differ.tolist()):
        raise VerificationError(
            f"{directory}: transformers begins patches elsewhere, first at position {differ[0]}, of {starts.sum()}"
        )
    return _Boundaries(int(starts.sum()), len(differ), bool((cut.starts == theirs.starts).all()))
