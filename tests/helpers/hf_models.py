"""Small models with random weights, and checkpoints of them."""

from dataclasses import replace
from pathlib import Path

import torch

from blt_titan import BLT, EntropyModel
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.model.args import EntropyModelArgs
from blt_titan.patching.rule import PatchRule
from tests.helpers.generating_models import ARGS as SMALL
from tests.helpers.small_entropy_model import model_of

ARGS = replace(SMALL, local_window=40)
RULE = PatchRule("global", threshold=1.0 + 2**-11, max_patch_bytes=512)
"""Amid two float16 values."""


def random_blt(**changes) -> BLT:
    model = BLT(replace(ARGS, **changes))
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def entropy_model(**changes) -> EntropyModel:
    model = EntropyModel(EntropyModelArgs(dim=32, n_heads=2, n_layers=3, ffn_hidden=64, window=24, **changes))
    model.load_state_dict(model_of(**changes).state_dict())
    return model.eval()


def another_model() -> EntropyModel:
    model = entropy_model()
    with torch.no_grad():
        model.output.weight.mul_(1.5)
    return model


def write_checkpoints(folder: Path) -> Path:
    """Write a BLT and its entropy model as training checkpoints, `blt` and `entropy`."""
    write_checkpoint(random_blt(), "blt", ARGS, folder / "blt", rule=RULE)
    write_checkpoint(entropy_model(), "blt_entropy", entropy_model().args, folder / "entropy")
    return folder
