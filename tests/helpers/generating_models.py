"""A small BLT whose next byte is not near a tie, and rules of every kind to generate with."""

from dataclasses import replace

import torch

from blt_titan.model.args import BLTArgs
from blt_titan.model.blt import BLT
from blt_titan.patching.rule import PatchRule

ARGS = BLTArgs(
    local_dim=32,
    local_heads=2,
    local_window=24,
    local_ffn_hidden=48,
    decoder_layers=2,
    global_dim=96,
    global_heads=4,
    global_layers=2,
    global_ffn_hidden=80,
    cross_attn_k=2,
    cross_attn_heads=2,
    hash_rows=101,
)
RULES = {
    "entropy": PatchRule("global", threshold=1.0 + 2**-11, max_patch_bytes=512),
    "entropy, short": PatchRule("global", threshold=1.5, max_patch_bytes=5),
    "monotonic": PatchRule("monotonic", threshold=0.1, max_patch_bytes=16),
    "monotonic, uint8": PatchRule("monotonic", threshold=0.1, max_patch_bytes=16, storage="uint8"),
    "add": PatchRule("add", threshold=0.5, threshold_add=0.1, max_patch_bytes=16),
    "space": PatchRule("space", max_patch_bytes=16),
    "static": PatchRule("static", stride=4, max_patch_bytes=512),
    "byte": PatchRule("byte"),
}


def blt(**changes) -> BLT:
    model = BLT(replace(ARGS, **changes))
    model.init_weights()
    with torch.no_grad():
        model.decoder.output.weight *= 4
    return model.eval()
