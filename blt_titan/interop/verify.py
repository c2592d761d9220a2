"""Compare an exported directory with what it was made from, and with what `transformers` computes from it."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from blt_titan.inference.entropies import EntropyScorer, entropy_nats
from blt_titan.interop.export import Weights, model_entries
from blt_titan.interop.hf_names import blt_name_to_hf, entropy_name_to_hf
from blt_titan.interop.pretrained import BLT, ByteTokenizer, EntropyModel, Pretrained
from blt_titan.interop.transformers_order import FloatsAre, logits_in_transformers_order
from blt_titan.model.blt import BLT as BareBLT
from blt_titan.model.entropy_model import EntropyModel as BareEntropyModel
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rounding import decision_edge
from blt_titan.patching.rule import PatchRule

LOGITS_ATOL = 1e-5
"""Of logits in fp32, both computed in the order of operations of transformers. That leaves 0 or a few roundings."""
FLOAT64_RTOL = 1e-9
"""Of logits that both compute in fp64, each in its own order, times the largest where that is above 1. One function
leaves 1e-13; a single step of it in fp32 leaves 1e-8 and more."""
ROUNDING_RATIO = 10.0
"""Our logits in fp32, in our own order, lie at most this many times further from those in fp64 than those of
transformers do. How far either lies is up to the weights, which amplify rounding; over 162 random models the ratio was
0.3 to 2.3, and one step in bf16 would make it thousands."""
EDGE_NATS = 1e-4
"""Two fp32 computations of an entropy may fall on two sides of a decision edge that is nearer than this."""
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
    """What was compared."""

    tensors: int
    largest_logit: float
    logits_error: float
    """Largest difference to `transformers` in fp32, with our patch lengths, in its order of operations."""
    float64_error: float
    """The same in fp64, each in its own order: whether the two are one function."""
    rounding_error: float
    """The same in fp32, each in its own order: what people will see."""
    our_rounding: float
    """Largest difference of our logits in fp32 to those in fp64."""
    their_rounding: float
    """The same of those of `transformers`, which makes rotary angles in fp32."""
    boundaries: int
    boundaries_at_edges: int
    """That differ, all within EDGE_NATS of a decision edge."""
    own_patches: bool
    """Whether `transformers` also cut the text itself, and gave the same logits."""

    def __str__(self) -> str:
        lines = [
            f"{self.tensors} tensors are those of the checkpoint",
            f"logits (largest {self.largest_logit:.1f}) of transformers and ours differ by {self.logits_error:.1e} in "
            f"fp32 with the same order of operations, by {self.float64_error:.1e} in fp64, and by "
            f"{self.rounding_error:.1e} in fp32 with each one's own, which rounds theirs by {self.their_rounding:.1e}, "
            f"ours by {self.our_rounding:.1e}",
        ]
        if self.boundaries:
            own = "gives the same logits with its own" if self.own_patches else "was not compared with its own"
            lines.append(
                f"{self.boundaries} patch boundaries, {self.boundaries_at_edges} of them differ, at decision edges; "
                f"transformers {own}"
            )
        return "; ".join(lines)


def verify_export(
    directory: str | os.PathLike[str],
    blt: Weights,
    entropy: Weights | None,
    *,
    text: str = TEXT,
) -> Verification:
    """Compare a directory with the weights that it was written from, and its model with ours.

    Logits are compared three times: in fp32 with the operations of both in one order, where they must be the same
    within 1e-5; in fp64, where rounding hides nothing; and in fp32 as people will compute them. One model is in memory
    at a time, at most 8 bytes per parameter.

    Args:
        directory: written by `export_hf`.
        blt: what the BLT was written from.
        entropy: what the patcher was written from, if it has one.
        text: what both models read.

    Raises:
        VerificationError: something differs; says what.
        ImportError: transformers is not installed.
    """
    directory = Path(directory)
    pretrained = Pretrained(directory)
    inside = entropy if pretrained.has_entropy_model else None
    _compare_settings(pretrained, blt, inside)
    tensors = _compare_tensors(pretrained, blt, inside)
    ids = ByteTokenizer().encode(text)
    found, their_logits, alone = _read_with_transformers(pretrained, text, ids)
    ours = BLT.from_pretrained(directory)
    ids_1S, lengths_1P = torch.tensor([ids]), torch.from_numpy(found.lengths)[None]
    with torch.no_grad():
        same_order = logits_in_transformers_order(ours, ids_1S, lengths_1P)
    our_logits = _both_precisions(ours, lambda: ours.logits(ids_1S, lengths_1P))

    largest = float(our_logits.fp64.abs().max())
    scale = max(1.0, largest)
    exact_error = _largest_difference(our_logits.fp64, their_logits.fp64)
    if not exact_error <= FLOAT64_RTOL * scale:
        raise VerificationError(
            f"{directory}: logits computed in fp64 differ by {exact_error:.1e}, allowed are {FLOAT64_RTOL * scale:.1e}"
        )
    error = _largest_difference(same_order, their_logits.fp32)
    if not error <= LOGITS_ATOL:
        raise VerificationError(
            f"{directory}: logits in fp32 differ by {error:.1e} though both compute in one order, allowed are "
            f"{LOGITS_ATOL:.1e}"
        )
    our_rounding = _largest_difference(our_logits.fp32, our_logits.fp64)
    their_rounding = _largest_difference(their_logits.fp32, their_logits.fp64)
    allowed = ROUNDING_RATIO * max(their_rounding, torch.finfo(torch.float32).eps * scale)
    if not our_rounding <= allowed:
        raise VerificationError(
            f"{directory}: our own logits in fp32 are {our_rounding:.1e} from those in fp64, allowed are "
            f"{allowed:.1e}; transformers' are {their_rounding:.1e} from theirs"
        )
    if alone is not None:
        # Whether a patch begins after the last byte decides what that byte reads, and transformers never asks.
        alone_error = _largest_difference(same_order[:, :-1], alone[:, :-1])
        if not alone_error <= LOGITS_ATOL:
            raise VerificationError(
                f"{directory}: with its own patches transformers' logits differ by {alone_error:.1e}, allowed are "
                f"{LOGITS_ATOL:.1e}"
            )
    return Verification(
        tensors=tensors,
        largest_logit=largest,
        logits_error=error,
        float64_error=exact_error,
        rounding_error=_largest_difference(our_logits.fp32, their_logits.fp32),
        our_rounding=our_rounding,
        their_rounding=their_rounding,
        boundaries=found.count,
        boundaries_at_edges=found.differ,
        own_patches=found.same,
    )


def _read_with_transformers(
    pretrained: Pretrained, text: str, ids: list[int]
) -> tuple["_Boundaries", "_Logits", torch.Tensor | None]:
    """Return the patches of a text, its logits, and those with patches of transformers' own if they are the same."""
    import transformers

    directory = pretrained.directory
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    theirs, info = loaded
    theirs = theirs.eval()
    if info["missing_keys"] or info["unexpected_keys"]:
        raise VerificationError(
            f"{directory}: transformers misses {info['missing_keys']}, does not know {info['unexpected_keys']}"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if tokenizer(text)["input_ids"] != ids or tokenizer.decode(ids, skip_special_tokens=True) != text:
        raise VerificationError(f"{directory}: AutoTokenizer does not give the bytes of a text")
    if pretrained.has_entropy_model:
        assert pretrained.rule is not None
        found = _compare_boundaries(directory, theirs, np.array(ids), pretrained.rule)
    else:
        any_rule = PatchRule("space", max_patch_bytes=16)
        found = _Boundaries(starts_to_lengths(any_rule.mark(np.array(ids), include_next=True)))
    ids_1S, lengths_1P = torch.tensor([ids]), torch.from_numpy(found.lengths)[None]
    with torch.no_grad():
        alone = theirs(ids_1S, use_cache=False).logits if found.same else None
    logits = _both_precisions(theirs, lambda: theirs(ids_1S, patch_lengths=lengths_1P, use_cache=False).logits)
    return found, logits, alone


class _Logits(NamedTuple):
    fp32: torch.Tensor
    fp64: torch.Tensor


def _both_precisions(model: nn.Module, logits: Callable[[], torch.Tensor]) -> _Logits:
    """Compute logits with a model in fp32, then in fp64, in which it stays."""
    with torch.no_grad():
        fp32 = logits()
        model.double()
        with FloatsAre(torch.float64):
            for module in model.modules():
                # transformers keeps the frequencies of its rotary angles, rounded to fp32 when they were made.
                if hasattr(module, "inv_freq"):
                    module.inv_freq = type(module)(module.config).inv_freq
            return _Logits(fp32, logits())


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


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
    dtype = getattr(torch, pretrained.dtype)
    entries = model_entries(blt, BareBLT, blt_name_to_hf, dtype)
    if entropy is not None:
        entries += model_entries(entropy, BareEntropyModel, entropy_name_to_hf, torch.float32)
    for entry in entries:
        written = pretrained.tensor(entry.name)
        if written.dtype != entry.dtype:
            raise VerificationError(f"{pretrained.directory}: {entry.name} is {written.dtype}, not {entry.dtype}")
        begin = 0
        for block in entry.blocks():
            part = written[begin : begin + len(block)]
            if not torch.equal(part, block.to(part.dtype)):
                raise VerificationError(f"{pretrained.directory}: {entry.name} is not what {blt.origin} holds")
            begin += len(block)
    return len(entries)


def _compare_boundaries(directory: Path, theirs: Any, ids: np.ndarray, rule: PatchRule) -> "_Boundaries":
    nats = EntropyScorer(EntropyModel.from_pretrained(directory), lanes=1).score(ids)
    rounded = rule.rounded(nats)
    config = theirs.config
    with torch.no_grad():
        _, their_lengths, their_logits = theirs.model.patcher(
            torch.from_numpy(ids)[None], patch_size=config.patch_size, threshold=config.patching_threshold
        )
    error = float(np.abs(entropy_nats(their_logits[0]).numpy() - nats).max())
    if not error <= EDGE_NATS:
        raise VerificationError(f"{directory}: entropies differ by {error:.1e} nats, allowed are {EDGE_NATS:.1e}")
    # transformers splits no long patches, so what is compared is the rule without its limit.
    starts = replace(rule, max_patch_bytes=None).mark(ids, rounded)
    their_starts = np.zeros(len(ids) + 1, bool)
    their_starts[np.cumsum(np.concatenate([[0], their_lengths[0].long().numpy()[:-1]]))] = True
    differ = np.flatnonzero(starts != their_starts[: len(ids)])
    low, high = decision_edge(float(rule.threshold or 0), rule.storage)
    if any(not low - EDGE_NATS <= nats[i - 1] <= high + EDGE_NATS for i in differ.tolist()):
        raise VerificationError(
            f"{directory}: transformers begins patches elsewhere, first at position {differ[0]}, of {starts.sum()}"
        )
    limited = rule.mark(ids, rounded, include_next=True)
    same = not len(differ) and bool((limited[: len(ids)] == starts).all())
    return _Boundaries(starts_to_lengths(limited), int(starts.sum()), len(differ), same)


class _Boundaries(NamedTuple):
    lengths: np.ndarray
    """Ours, int64 [P], with the next position."""
    count: int = 0
    differ: int = 0
    same: bool = False
    """Whether transformers cuts exactly where we do."""
