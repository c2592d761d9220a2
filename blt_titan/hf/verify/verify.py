"""Compare an exported directory with what it was made from, and with what `transformers` computes from it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from blt_titan.checkpoint.description import identity
from blt_titan.hf.export import Weights, check_names
from blt_titan.hf.model_card import OLDEST_TRANSFORMERS
from blt_titan.hf.names import blt_name_to_hf, entropy_name_to_hf
from blt_titan.hf.pretrained import ByteTokenizer, Pretrained, PretrainedBLT, PretrainedEntropyModel
from blt_titan.hf.verify.precision import CastsTo, compute_in_both, largest_difference
from blt_titan.layout import layout_without_patches
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rounding import decision_edge
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer, entropy_nats

OWN_PATCHES_ATOL = 1e-5
"""Difference of logits in fp32 of transformers, when it cuts the text itself and when it is given those patches."""
FLOAT64_RTOL = 1e-9
"""Difference of logits in fp64, times the largest where that is above 1. One function leaves 1e-13; a
single step of it in fp32 leaves 1e-8 and more."""
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


class VerificationError(ValueError):
    """An exported directory that is not what it should be; says in what."""


@dataclass(frozen=True)
class Verification:
    """What was compared, and found equal; `str()` says it in sentences."""

    release: str
    """Version of `transformers`."""
    tensors: int
    dtype: str
    """Type of the weights; the rest is computed from them in fp32 and fp64."""
    largest_logit: float
    float64_error: float
    """Largest difference of our logits to those of `transformers` in fp64."""
    float32_error: float
    """The same in fp32; told, not judged."""
    boundaries: int
    """Boundaries of patches; 0 without an entropy model, where `transformers` cuts no text."""
    boundaries_at_edges: int
    """Boundaries that differ, all where an entropy lies at a decision edge."""
    own_patches: bool
    """Whether `transformers` also cut the text as we do, and gave the same logits with its own patches."""

    def __str__(self) -> str:
        sentences = [
            f"All {self.tensors} tensors ({self.dtype}) equal those of the checkpoint.",
            f"Logits of transformers {self.release} and of blt_titan are equal in fp64: of logits up to "
            f"{self.largest_logit:.1f} the largest difference is {self.float64_error:.1e}.",
            f"In fp32 the largest difference is {self.float32_error:.1e}: rounding, which each does in an order of its "
            "own.",
        ]
        if self.boundaries:
            sentences.append(
                f"All {self.boundaries} patch boundaries are equal."
                if not self.boundaries_at_edges
                else f"Of {self.boundaries} patch boundaries {self.boundaries_at_edges} differ, where an entropy is as "
                "near to the threshold as rounding moves it."
            )
            if self.own_patches:
                sentences.append("With patches of its own transformers gives the same logits.")
        return " ".join(sentences)


def verify_export(
    directory: str | os.PathLike[str], blt: Weights, entropy: Weights | None, *, text: str | None = None
) -> Verification:
    """Compare a directory with the weights that it was written from, and its model with ours.

    Settings and tensors must be those of the checkpoint, logits must be equal in fp64, where rounding hides nothing,
    and patches must begin at the same bytes. In fp32 the difference is told, not judged: each computes in an order of
    its own, and weights amplify rounding. One model is in memory at a time: 8 bytes per parameter and 4 more of the
    largest tensor.

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
    cut = cut_text(pretrained, np.array(ids))
    theirs = run_transformers(pretrained, text, ids, cut)
    boundaries = _Boundaries()
    if cut.nats is not None:
        boundaries = _compare_boundaries(pretrained, np.array(ids), cut, theirs)

    ours = PretrainedBLT.from_pretrained(directory)
    ids_1S, lengths_1P = torch.tensor([ids]), torch.from_numpy(cut.lengths)[None]
    fp32, fp64 = compute_in_both(ours, lambda: ours.logits(ids_1S, lengths_1P))
    largest = float(fp64.abs().max())
    allowed = FLOAT64_RTOL * max(1.0, largest)
    float64_error = largest_difference(fp64, theirs.logits[1])
    if not float64_error <= allowed:
        raise VerificationError(
            f"{directory}: logits computed in fp64 differ by {float64_error:.1e}, allowed are {allowed:.1e} "
            f"(transformers {release})"
        )
    if boundaries.same:
        _compare_own_patches(directory, theirs)
    return Verification(
        release=release,
        tensors=tensors,
        dtype=pretrained.dtype,
        largest_logit=largest,
        float64_error=float64_error,
        float32_error=largest_difference(fp32, theirs.logits[0]),
        boundaries=boundaries.count,
        boundaries_at_edges=boundaries.differ,
        own_patches=boundaries.same,
    )


def _compare_own_patches(directory: Path, theirs: "TransformersOutput") -> None:
    """Compare the logits of `transformers` with its own patches, which are ours, with those when ours are given."""
    assert theirs.alone is not None
    error = largest_difference(theirs.alone, theirs.logits[0])
    if not error <= OWN_PATCHES_ATOL:
        raise VerificationError(
            f"{directory}: transformers cuts the text as we do, but its logits then differ by {error:.1e} from those "
            f"with the same patches given, allowed are {OWN_PATCHES_ATOL:.1e}"
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


class Cut(NamedTuple):
    """How we cut the text; of positions that may begin a patch there is one more than there are ids."""

    lengths: np.ndarray
    """Lengths of patches in bytes, int64 [P]."""
    starts: np.ndarray
    """Where patches start, bool [N + 1]."""
    nats: np.ndarray | None = None
    """Entropies, fp32 [N]; None without an entropy model, where any patches will do."""
    entropy_logits: torch.Tensor | None = None
    """Logits of the entropy model, in fp64 [1, N, V]."""


def cut_text(pretrained: Pretrained, ids: np.ndarray) -> Cut:
    """Cut ids by the rule of a directory; without an entropy model, at spaces."""
    if not pretrained.has_entropy_model:
        starts = PatchRule("space", max_patch_bytes=16).mark(ids, include_next=True)
        return Cut(starts_to_lengths(starts), starts)
    assert pretrained.rule is not None
    nats = EntropyScorer(PretrainedEntropyModel.from_pretrained(pretrained.directory), lanes=1).score(ids)
    starts = pretrained.rule.mark(ids, pretrained.rule.rounded(nats), include_next=True)
    model = PretrainedEntropyModel.from_pretrained(pretrained.directory).double()
    ids_1N = torch.from_numpy(ids)[None]
    with torch.no_grad(), CastsTo(torch.float64):
        logits = model(ids_1N, layout_without_patches(torch.zeros_like(ids_1N)))
    return Cut(starts_to_lengths(starts), starts, nats, logits)


class TransformersOutput(NamedTuple):
    """What `transformers` computes of the text."""

    logits: tuple[torch.Tensor, torch.Tensor]
    """Logits with our patches, in fp32 and fp64, [1, N, V]."""
    alone: torch.Tensor | None = None
    """Logits with its own patches, in fp32."""
    starts: np.ndarray | None = None
    """Where its own patches start, bool [N + 1]."""
    entropy_logits: tuple[torch.Tensor, torch.Tensor] | None = None
    """Logits of its patcher, in fp32 and fp64, [1, N, V]."""


def run_transformers(pretrained: Pretrained, text: str, ids: list[int], cut: Cut) -> TransformersOutput:
    """Compute what `transformers` gives of a text, with our patches and, if it has an entropy model, with its own.

    Raises:
        VerificationError: it does not know the tensors, or its tokenizer gives other ids.
    """
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
        return TransformersOutput(compute_in_both(model, logits))

    def own_patches() -> tuple[torch.Tensor, torch.Tensor]:
        config = model.config
        _, lengths, entropy_logits = model.model.patcher(
            ids_1N, patch_size=config.patch_size, threshold=config.patching_threshold
        )
        return lengths, entropy_logits

    with torch.no_grad():
        alone = model(ids_1N, use_cache=False).logits
    fp32, fp64 = compute_in_both(model, lambda: (logits(), *own_patches()))
    starts = np.zeros(len(ids) + 1, bool)
    starts[np.cumsum(np.concatenate([[0], fp32[1][0].long().numpy()[:-1]]))] = True
    return TransformersOutput((fp32[0], fp64[0]), alone, starts, (fp32[2], fp64[2]))


def _compare_settings(pretrained: Pretrained, blt: Weights, entropy: Weights | None) -> None:
    """Compare what config.json says with what the checkpoint says: both models are built from the former."""
    pairs = [("", identity(pretrained.blt_args), identity(blt.args))]
    if entropy is not None:
        pairs.append(("entropy model ", identity(pretrained.entropy_args), identity(entropy.args)))
    if blt.rule is not None and pretrained.rule is not None:
        pairs.append(("patching ", pretrained.rule.as_dict(), blt.rule.as_dict()))
    for what, written, meant in pairs:
        for key, value in meant.items():
            if written[key] != value:
                raise VerificationError(
                    f"{pretrained.directory}/config.json: {what}{key} is {written[key]!r}, the checkpoint's {value!r}"
                )


def _compare_tensors(pretrained: Pretrained, blt: Weights, entropy: Weights | None) -> int:
    models: list[tuple[Weights, Any, Callable[[str], str], torch.dtype]]
    models = [(blt, BLT, blt_name_to_hf, getattr(torch, pretrained.dtype))]
    if entropy is not None:
        models.append((entropy, EntropyModel, entropy_name_to_hf, torch.float32))
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


def _compare_boundaries(pretrained: Pretrained, ids: np.ndarray, cut: Cut, theirs: TransformersOutput) -> _Boundaries:
    directory, rule = pretrained.directory, pretrained.rule
    assert rule is not None
    assert cut.nats is not None
    assert cut.entropy_logits is not None
    assert theirs.entropy_logits is not None
    allowed = FLOAT64_RTOL * max(1.0, float(cut.entropy_logits.abs().max()))
    float64_error = largest_difference(cut.entropy_logits, theirs.entropy_logits[1])
    if not float64_error <= allowed:
        raise VerificationError(
            f"{directory}: logits of the entropy model computed in fp64 differ by {float64_error:.1e}, allowed are "
            f"{allowed:.1e}"
        )
    fp32, fp64 = (entropy_nats(logits[0]) for logits in theirs.entropy_logits)
    near = max(EDGE_NATS, 2 * largest_difference(fp32, fp64))
    error = largest_difference(fp32, torch.from_numpy(cut.nats))
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
