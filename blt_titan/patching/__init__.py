"""Cut bytes into patches: from entropies, at spaces, at a stride; numpy arrays and torch tensors alike."""

from blt_titan.patching.entropy import EntropyRule, entropy_patch_starts, patch_lengths
from blt_titan.patching.limits import lengths_to_starts, limit_patch_bytes, starts_to_lengths
from blt_titan.patching.text import (
    TextRule,
    byte_patch_starts,
    rule_patch_starts,
    space_patch_starts,
    static_patch_starts,
)

__all__ = [
    "EntropyRule",
    "TextRule",
    "byte_patch_starts",
    "entropy_patch_starts",
    "lengths_to_starts",
    "limit_patch_bytes",
    "patch_lengths",
    "rule_patch_starts",
    "space_patch_starts",
    "starts_to_lengths",
    "static_patch_starts",
]
