"""FLOPs of one byte's forward pass, 2 per multiply-add.

Weights cost 2 per parameter they hold; attention 4 * width per visible key, half the context on average for the causal
global stack. Norms, softmax, pooling and the hash look-ups are left out.
"""

from typing import TYPE_CHECKING, NamedTuple

from blt_titan.byte_vocab import VOCAB_SIZE

if TYPE_CHECKING:
    from blt_titan.model.args import BLTArgs, EntropyModelArgs


class PartFlops(NamedTuple):
    """FLOPs of one byte's forward pass by part of a BLT."""

    encoder: float
    global_layer: float
    """FLOPs of each global layer."""
    decoder: float


def blt_flops(args: "BLTArgs", context_bytes: int, patch_bytes: float) -> PartFlops:
    """Count the FLOPs of a BLT.

    Args:
        args: its shape.
        context_bytes: length of a row in bytes.
        patch_bytes: mean patch length in bytes.
    """
    d, f_d, G, f_G, k = (
        args.local_dim,
        args.local_ffn_hidden,
        args.global_dim,
        args.global_ffn_hidden,
        args.cross_attn_k,
    )
    context_patches = context_bytes / patch_bytes
    global_layer = 2 * (4 * G * G + 3 * G * f_G) + 4 * G * context_patches / 2
    into_global = 2 * d * args.patch_dim + (2 * args.patch_dim * G if args.patch_dim != G else 0)
    out_of_global = 2 * args.patch_dim * G
    local_layer = 2 * (4 * d * d + 3 * d * f_d) + 4 * d * args.local_window
    # Two projections on the bytes' side, two on the k slots of a patch, k scores and k sums per byte.
    cross = 4 * d * d + 4 * d * d * k / patch_bytes + 4 * d * k
    encoder_cross = args.encoder_layers if args.encoder_cross_attn_all_layers else 1
    decoder_cross = args.decoder_layers if args.decoder_cross_attn_all_layers else 1
    head = 2 * d * VOCAB_SIZE
    return PartFlops(
        encoder=args.encoder_layers * local_layer + encoder_cross * cross + into_global / patch_bytes,
        global_layer=global_layer / patch_bytes,
        decoder=args.decoder_layers * local_layer + decoder_cross * cross + out_of_global / patch_bytes + head,
    )


def entropy_model_flops(args: "EntropyModelArgs") -> float:
    """Count the FLOPs of an entropy model; the window, not the context, bounds attention."""
    blocks = args.n_layers * (2 * (4 * args.dim**2 + 3 * args.dim * args.ffn_hidden) + 4 * args.dim * args.window)
    return blocks + 2 * args.dim * VOCAB_SIZE
