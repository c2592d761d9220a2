"""Model sizes: what a flavour's name means, how many parameters it has and how many FLOPs a byte costs.

A flavour is named by the parameters that compute: a 1B also carries 3.07B of hash tables, which are only looked up.
`8B` is the shape released as 7B; `1B` and `entropy 100M` are released shapes too. 400M, 2B and 4B follow the paper's
scaling table as remembered, not checked against it; 20M and 100M keep its proportions for a laptop or one GPU; `debug`
trains in minutes on two CPU cores.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch.nn as nn

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.attention import AttentionBackend
from blt_titan.model.initialization import DepthScaling
from blt_titan.model.layers import swiglu_hidden


def _require_divides(heads_name: str, heads: int, width_name: str, width: int) -> None:
    if heads < 1 or width % heads or (width // heads) % 2:
        raise ValueError(f"{width_name} = {width} must be an even multiple of {heads_name} = {heads}")


def _require_choices(args: "BLTArgs | EntropyModelArgs") -> None:
    for name, choices in (
        ("attention_backend", get_args(AttentionBackend)),
        ("init_depth_scaling", get_args(DepthScaling)),
    ):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(args, name)!r}")


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class PartFlops(NamedTuple):
    """FLOPs of one byte's forward pass."""

    encoder: float
    global_layer: float
    decoder: float


NOT_THE_MODEL = {"identity": False}
"""Marks arguments that change neither the shape of weights nor what is computed with them: `checkpoint.identity`."""


@dataclass
class BLTArgs:
    """Everything that fixes a BLT's shape and initial weights. Widths in features, windows in bytes."""

    local_dim: int = 1024
    """Width d of encoder and decoder."""
    local_heads: int = 16
    """Attention heads of the local blocks."""
    local_window: int = 512
    """How many bytes a byte sees in the local stacks, itself included."""
    local_ffn_hidden: int = 0
    """SwiGLU hidden width of the local blocks; 0 takes `swiglu_hidden(local_dim)`."""
    encoder_layers: int = 1
    """Local blocks before the patches."""
    decoder_layers: int = 9
    """Local blocks after the patches."""
    global_dim: int = 2048
    """Width G of the global transformer."""
    global_heads: int = 16
    """Attention heads of the global blocks."""
    global_layers: int = 25
    """Blocks of the global transformer."""
    global_ffn_hidden: int = 0
    """SwiGLU hidden width of the global blocks; 0 takes `swiglu_hidden(global_dim)`."""
    cross_attn_k: int = 2
    """Slots of width d that stand for one patch in cross-attention."""
    cross_attn_heads: int = 16
    """Heads of the cross-attention, on both sides."""
    encoder_cross_attn_all_layers: bool = False
    """Patches read bytes after every encoder layer, keeping their state, instead of after the last only."""
    decoder_cross_attn_all_layers: bool = True
    """Bytes read patches before every decoder layer instead of before the first only."""
    hash_ngrams: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    """Lengths of the hashed byte n-grams."""
    hash_functions: int = 1
    """Hash functions, each with a table per n-gram length."""
    hash_rows: int = 500_002
    """Rows V of one hash table."""
    rope_theta: float = 500_000.0
    """RoPE base of the local and global stacks."""
    attention_backend: AttentionBackend = field(default="auto", metadata=NOT_THE_MODEL)
    """"auto": FlexAttention on CUDA, block-local SDPA elsewhere."""
    init_depth_scaling: DepthScaling = field(default="none", metadata=NOT_THE_MODEL)
    """Divide the initial std of block outputs by nothing, sqrt(2 (l + 1)) or sqrt(2 (L + 1))."""
    init_seed: int = field(default=0, metadata=NOT_THE_MODEL)
    """Seed of the initial weights; a run sets it from `debug.seed`."""
    nominal_patch_bytes: float = field(default=4.5, metadata=NOT_THE_MODEL)
    """Mean patch length that `get_nparams_and_flops` assumes; metrics use the measured one."""

    def __post_init__(self):
        self.local_ffn_hidden = self.local_ffn_hidden or swiglu_hidden(self.local_dim)
        self.global_ffn_hidden = self.global_ffn_hidden or swiglu_hidden(self.global_dim)

    @property
    def patch_dim(self) -> int:
        """Width of a patch's k slots side by side."""
        return self.cross_attn_k * self.local_dim

    @property
    def local_head_dim(self) -> int:
        """Head size of the local stacks."""
        return self.local_dim // self.local_heads

    @property
    def global_head_dim(self) -> int:
        """Head size of the global transformer."""
        return self.global_dim // self.global_heads

    def validate(self) -> None:
        """Raise ValueError, naming the field, if the shape cannot be built."""
        _require_divides("local_heads", self.local_heads, "local_dim", self.local_dim)
        _require_divides("cross_attn_heads", self.cross_attn_heads, "local_dim", self.local_dim)
        _require_divides("global_heads", self.global_heads, "global_dim", self.global_dim)
        for name in ("encoder_layers", "decoder_layers", "global_layers", "cross_attn_k", "local_window", "hash_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _require_choices(self)

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take over what a run decides: the seed (torchtitan's hook; reads `debug.seed` only)."""
        self.init_seed = job_config.debug.seed or 0

    @property
    def vocab_size(self) -> int:
        """Ids, and so logits of a byte."""
        return VOCAB_SIZE

    def forward_flops_per_byte(self, context_bytes: int, patch_bytes: float) -> float:
        """Count the FLOPs of one byte's forward pass; see `flops_by_part`."""
        parts = self.flops_by_part(context_bytes, patch_bytes)
        return parts.encoder + self.global_layers * parts.global_layer + parts.decoder

    def flops_by_part(self, context_bytes: int, patch_bytes: float) -> "PartFlops":
        """Count the FLOPs of one byte's forward pass by part of the model, 2 per multiply-add.

        Weights cost 2 per parameter they hold; attention 4 * width per visible key, half the context on average
        for the causal global stack. Norms, softmax, pooling and the hash look-ups are left out.

        Args:
            context_bytes: length of a row in bytes.
            patch_bytes: mean patch length in bytes.
        """
        d, f_d, G, f_G, k = (
            self.local_dim,
            self.local_ffn_hidden,
            self.global_dim,
            self.global_ffn_hidden,
            self.cross_attn_k,
        )
        context_patches = context_bytes / patch_bytes
        global_layer = 2 * (4 * G * G + 3 * G * f_G) + 4 * G * context_patches / 2
        into_global = 2 * d * self.patch_dim + (2 * self.patch_dim * G if self.patch_dim != G else 0)
        out_of_global = 2 * self.patch_dim * G
        local_layer = 2 * (4 * d * d + 3 * d * f_d) + 4 * d * self.local_window
        # Two projections on the bytes' side, two on the k slots of a patch, k scores and k sums per byte.
        cross = 4 * d * d + 4 * d * d * k / patch_bytes + 4 * d * k
        encoder_cross = self.encoder_layers if self.encoder_cross_attn_all_layers else 1
        decoder_cross = self.decoder_layers if self.decoder_cross_attn_all_layers else 1
        head = 2 * d * VOCAB_SIZE
        return PartFlops(
            encoder=self.encoder_layers * local_layer + encoder_cross * cross + into_global / patch_bytes,
            global_layer=global_layer / patch_bytes,
            decoder=self.decoder_layers * local_layer + decoder_cross * cross + out_of_global / patch_bytes + head,
        )

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return all parameters, and training FLOPs per byte (3 forwards) in rows of `seq_len` bytes."""
        flops = 3 * self.forward_flops_per_byte(seq_len, self.nominal_patch_bytes)
        return _count_parameters(model), round(flops)


@dataclass
class EntropyModelArgs:
    """Everything that fixes an entropy model's shape and initial weights."""

    dim: int = 768
    """Width."""
    n_heads: int = 12
    """Attention heads."""
    n_layers: int = 14
    """Blocks."""
    ffn_hidden: int = 0
    """SwiGLU hidden width; 0 takes `swiglu_hidden(dim)`."""
    window: int = 512
    """How many bytes a byte sees, itself included."""
    rope_theta: float = 10_000.0
    """RoPE base."""
    reset_at_newline: bool = False
    """A byte sees nothing from before its line; a run sets it from `entropy_model.reset_at_newline`."""
    attention_backend: AttentionBackend = field(default="auto", metadata=NOT_THE_MODEL)
    """"auto": FlexAttention on CUDA, block-local SDPA elsewhere."""
    init_depth_scaling: DepthScaling = field(default="none", metadata=NOT_THE_MODEL)
    """As in `BLTArgs`."""
    init_seed: int = field(default=0, metadata=NOT_THE_MODEL)
    """Seed of the initial weights; a run sets it from `debug.seed`."""

    def __post_init__(self):
        self.ffn_hidden = self.ffn_hidden or swiglu_hidden(self.dim)

    def validate(self) -> None:
        """Raise ValueError, naming the field, if the shape cannot be built."""
        _require_divides("n_heads", self.n_heads, "dim", self.dim)
        for name in ("n_layers", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _require_choices(self)

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take over what a run decides: seed and context (torchtitan's hook; `debug.seed`, `entropy_model`)."""
        self.init_seed = job_config.debug.seed or 0
        self.reset_at_newline = job_config.entropy_model.reset_at_newline

    def forward_flops_per_byte(self, context_bytes: int, patch_bytes: float) -> float:
        """Count the FLOPs of one byte's forward pass; the window, not the context, bounds attention."""
        blocks = self.n_layers * (2 * (4 * self.dim**2 + 3 * self.dim * self.ffn_hidden) + 4 * self.dim * self.window)
        return blocks + 2 * self.dim * VOCAB_SIZE

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return all parameters, and training FLOPs per byte (3 forwards)."""
        return _count_parameters(model), round(3 * self.forward_flops_per_byte(seq_len, 1.0))


BLT_FLAVORS: dict[str, BLTArgs] = {
    "debug": BLTArgs(
        local_dim=96,
        local_heads=3,
        local_window=64,
        decoder_layers=2,
        global_dim=192,
        global_heads=4,
        global_layers=3,
        cross_attn_heads=3,
        hash_rows=4_001,
    ),
    "20M": BLTArgs(
        local_dim=256,
        local_heads=4,
        decoder_layers=3,
        global_dim=512,
        global_heads=8,
        global_layers=5,
        cross_attn_heads=4,
        hash_rows=20_011,
    ),
    "100M": BLTArgs(
        local_dim=384,
        local_heads=6,
        decoder_layers=5,
        global_dim=768,
        global_heads=12,
        global_layers=12,
        cross_attn_heads=6,
        hash_rows=100_003,
    ),
    "400M": BLTArgs(
        local_dim=768,
        local_heads=12,
        decoder_layers=7,
        global_dim=1280,
        global_heads=10,
        global_layers=24,
        # The scaling table gives 10, which does not divide the width of 768.
        cross_attn_heads=12,
    ),
    "1B": BLTArgs(),
    "2B": BLTArgs(global_dim=2560, global_heads=20, global_layers=26, cross_attn_k=3),
    "4B": BLTArgs(global_dim=3072, global_heads=24, global_layers=36, cross_attn_k=3),
    "8B": BLTArgs(
        local_dim=1280,
        local_heads=20,
        decoder_layers=6,
        global_dim=4096,
        global_heads=32,
        global_layers=32,
        cross_attn_k=4,
        cross_attn_heads=20,
    ),
}

ENTROPY_FLAVORS: dict[str, EntropyModelArgs] = {
    "debug": EntropyModelArgs(dim=96, n_heads=3, n_layers=2, window=128),
    "100M": EntropyModelArgs(),
}
