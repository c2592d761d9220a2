"""Load a BLT, its rule and its entropy model for inference, from whatever a user has: a checkpoint or a directory."""

import os
from dataclasses import dataclass

import torch

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.hf.pretrained import PretrainedBLT
from blt_titan.inference.generate import of_any_shape
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rule import PatchRule


@dataclass(frozen=True)
class Loaded:
    """What generation and evaluation need."""

    model: BLT
    rule: PatchRule
    entropy_model: EntropyModel | None
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
    model = PretrainedBLT.from_pretrained(path, entropy_model=entropy, threshold=threshold)
    rule, origin, entropy_model = model.rule, model.origin, None
    if rule is None:
        raise CheckpointError(
            f"{origin}: does not say where its patches begin, as directories of others may not; name --threshold for "
            "the rule 'global'"
        )
    if rule.by_entropy:
        entropy_model = model.entropy_model
        if entropy_model is None:
            raise CheckpointError(
                f"{origin}: its patches begin by entropy (rule {rule.rule!r}); name the entropy model, "
                "--entropy-checkpoint"
            )
        entropy_model = of_any_shape(entropy_model.to(device))
    return Loaded(of_any_shape(model.to(device, dtype)), rule, entropy_model, origin)
