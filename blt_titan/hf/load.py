"""Load a BLT, its rule and its entropy model for inference, from whatever a user has: a checkpoint or a directory."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from blt_titan.checkpoint.find import holds_checkpoint
from blt_titan.checkpoint.load import load_entropy_model, load_model
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.hf.export import Weights, check_entropy_model, stored_weights, with_threshold
from blt_titan.hf.pretrained import BLT, EntropyModel, Pretrained
from blt_titan.hf.tensors import ModuleTensors
from blt_titan.model.args import BLTArgs
from blt_titan.model.blt import BLT as BareBLT
from blt_titan.model.entropy_model import EntropyModel as BareEntropyModel
from blt_titan.patching.rule import PatchRule


@dataclass(frozen=True)
class Loaded:
    """What generation and evaluation need."""

    model: BareBLT
    rule: PatchRule
    entropy_model: BareEntropyModel | None
    """None for rules that read bytes only."""
    origin: str
    """The checkpoint or the directory."""


def load_for_inference(
    path: str | os.PathLike[str],
    *,
    entropy: str | os.PathLike[str] | None = None,
    threshold: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Load models in evaluation mode.

    Args:
        path: a checkpoint `step-N`, the folder of a run, a model directory, or the name of a repository on the hub.
        entropy: likewise, the entropy model; default that of the directory.
        threshold: nats; another patch size than in training, by any entropy model.
        device: to load to.
        dtype: to compute in; the entropy model stays in fp32, so that its patches are those of the data.

    Raises:
        CheckpointError: a checkpoint cannot be read, or lacks what is needed.
        FileNotFoundError: there is no such model.
        ValueError: a directory does not hold what it should, or the rule has no threshold.
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: cannot be used here ({' '.join(str(error).split())[:150]})") from error
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold {threshold}: must be a number of nats")
    if holds_checkpoint(path):
        weights = stored_weights(path)
        if not isinstance(weights.args, BLTArgs):
            raise CheckpointError(f"{weights.origin}: holds an entropy model, not a BLT")
        model = load_model(lambda: BareBLT(weights.args), weights.origin)
        rule, inside, origin, fingerprint = weights.rule, None, weights.origin, weights.entropies
    else:
        pretrained = Pretrained(path)
        model, rule, origin = BLT.from_pretrained(pretrained.directory), pretrained.rule, str(path)
        fingerprint = pretrained.fingerprint
        inside = pretrained.directory if pretrained.has_entropy_model else None
    other_patches = False
    if threshold is not None:
        as_trained = rule
        rule, fingerprint = with_threshold(rule, fingerprint, threshold, origin)
        other_patches = rule != as_trained
    if rule is None:
        raise CheckpointError(
            f"{origin}: does not say where its patches begin, as directories of others may not; "
            "name --threshold for the rule 'global'"
        )
    entropy_model = None
    if rule.by_entropy:
        entropy_model = _entropy_model(entropy or inside, origin, rule, other_patches)
        if entropy is not None:
            found = Weights(entropy_model.args, ModuleTensors(entropy_model), str(entropy))
            check_entropy_model(fingerprint, found, rule)
        entropy_model = _of_any_shape(entropy_model.to(device).eval())
    return Loaded(_of_any_shape(model.to(device, dtype).eval()), rule, entropy_model, origin)


def _of_any_shape(model: Any) -> Any:
    """Have a model attend by SDPA: FlexAttention is compiled for each shape, and rows here have many."""
    model.args = replace(model.args, attention_backend="sdpa")
    return model


def _entropy_model(
    path: str | os.PathLike[str] | None, origin: str, rule: PatchRule, allow_changed: bool
) -> BareEntropyModel:
    if path is None:
        raise CheckpointError(
            f"{origin}: its patches begin by entropy (rule {rule.rule!r}); name the entropy model, --entropy-checkpoint"
        )
    if holds_checkpoint(path):
        return load_entropy_model(path)
    return EntropyModel.from_pretrained(path, allow_changed=allow_changed)
