"""Arguments of the two models: everything that fixes a shape and its initial weights."""

from dataclasses import dataclass, field
from typing import Any, get_args

import torch.nn as nn

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.attention import AttentionBackend
from blt_titan.model.flops import PartFlops, blt_flops, entropy_model_flops
from blt_titan.model.initialization import DepthScaling
from blt_titan.model.layers import swiglu_hidden
from blt_titan.model.varlen import DOCUMENTS


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


def _take_attention(args: "BLTArgs | EntropyModelArgs", model: Any) -> None:
    # What a flavour says stays, where the run says nothing.
    if model.attention_backend != "auto":
        args.attention_backend = model.attention_backend
    args.varlen_documents = model.varlen_documents


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


NOT_THE_MODEL = {"identity": False}
"""Marks arguments that change neither the shape of weights nor what is computed with them: `checkpoint.identity`."""
THE_RUN_ALONE = {"identity": False, "stored": False}
"""Marks those of them that no checkpoint holds."""


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
    """"auto": FlexAttention on CUDA, block-local SDPA elsewhere; "varlen": FlashAttention over runs of documents."""
    varlen_documents: int = field(default=DOCUMENTS, metadata=THE_RUN_ALONE)
    """Documents of a row that "varlen" has room for."""
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
        """Take over what a run decides: seed and attention (torchtitan's hook; reads `debug.seed` and `model`)."""
        self.init_seed = job_config.debug.seed or 0
        _take_attention(self, job_config.model)

    @property
    def vocab_size(self) -> int:
        """Ids, and so logits of a byte."""
        return VOCAB_SIZE

    def flops_by_part(self, context_bytes: int, patch_bytes: float) -> PartFlops:
        """Count the FLOPs of one byte's forward pass by part of the model; see `flops.blt_flops`."""
        return blt_flops(self, context_bytes, patch_bytes)

    def forward_flops_per_byte(self, context_bytes: int, patch_bytes: float) -> float:
        """Count the FLOPs of one byte's forward pass, in rows of so many bytes and patches of this mean length."""
        parts = self.flops_by_part(context_bytes, patch_bytes)
        return parts.encoder + self.global_layers * parts.global_layer + parts.decoder

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
    """"auto": FlexAttention on CUDA, block-local SDPA elsewhere; "varlen": FlashAttention over runs of documents."""
    varlen_documents: int = field(default=DOCUMENTS, metadata=THE_RUN_ALONE)
    """Documents of a row that "varlen" has room for."""
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
        """Take over what a run decides (torchtitan's hook; reads `debug.seed`, `model` and `entropy_model`)."""
        self.init_seed = job_config.debug.seed or 0
        _take_attention(self, job_config.model)
        self.reset_at_newline = job_config.entropy_model.reset_at_newline

    def forward_flops_per_byte(self, context_bytes: int, patch_bytes: float) -> float:
        """Count the FLOPs of one byte's forward pass; see `flops.entropy_model_flops`."""
        return entropy_model_flops(self)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return all parameters, and training FLOPs per byte (3 forwards)."""
        return _count_parameters(model), round(3 * self.forward_flops_per_byte(seq_len, 1.0))
