"""An entropy model that is small and not indifferent, and the plain way to score a document with it."""

import dataclasses

import numpy as np
import torch

from blt_titan.layout import layout_without_patches
from blt_titan.model.args import EntropyModelArgs
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.scoring.entropies import entropy_nats

ENTROPY_ATOL = 1e-4
"""Nats; fp32 sums in other blocks were seen to differ by 1e-6."""

ARGS = EntropyModelArgs(dim=32, n_heads=2, n_layers=3, ffn_hidden=64, window=24)


def model_of(**changes) -> EntropyModel:
    model = EntropyModel(dataclasses.replace(ARGS, **changes))
    with torch.no_grad():
        model.init_weights()
        model.output.weight *= 8  # entropies from 0.5 to 5 nats
    return model.eval()


@torch.no_grad()
def scored_alone(model: EntropyModel, ids: np.ndarray) -> np.ndarray:
    """One document, one row, no cache."""
    row = torch.from_numpy(ids.astype(np.int64))[None]
    logits = model(row, layout_without_patches(torch.zeros_like(row)))
    return entropy_nats(logits)[0].numpy()
