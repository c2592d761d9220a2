"""The shapes of models that are compared: ours, a token Llama of equal FLOPs, and the matrix products of ours alone."""

from dataclasses import dataclass

from blt_titan.bench.rows import Work
from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.args import BLTArgs
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.model.layers import swiglu_hidden

BENCH = BLTArgs(
    local_dim=256,
    local_heads=4,
    decoder_layers=4,
    global_dim=512,
    global_heads=8,
    global_layers=3,
    cross_attn_heads=4,
    hash_rows=2_003,
)
"""About 20M parameters, small hash tables: time goes into computation, as it does in a large model."""
TINY = BLTArgs(
    local_dim=32,
    local_heads=2,
    local_window=16,
    decoder_layers=1,
    global_dim=64,
    global_heads=2,
    global_layers=1,
    cross_attn_heads=2,
    hash_rows=97,
)
"""For tests of the benchmarks themselves."""
SHAPES: dict[str, BLTArgs] = {"bench": BENCH, "tiny": TINY, **BLT_FLAVORS}
"""What is measured, by name: the flavours, and two that are only measured."""

LLAMA_VOCAB = 32_000
LLAMA_TOKEN_BYTES = 4.5
"""Bytes of a token, as tokenizers of English text reach."""
_LLAMA_HEAD_DIM = 64
_FFN_MULTIPLE = 8


@dataclass(frozen=True)
class LlamaShape:
    """A token model: widths in features."""

    dim: int
    ffn_hidden: int
    layers: int

    @property
    def heads(self) -> int:
        """Attention heads."""
        return max(1, self.dim // _LLAMA_HEAD_DIM)

    def flops_per_byte(self, context_bytes: int) -> float:
        """Count the forward FLOPs of one byte, by the same rules as `model.flops`."""
        d, context_tokens = self.dim, context_bytes / LLAMA_TOKEN_BYTES
        layer = 2 * (4 * d * d + 3 * d * self.ffn_hidden) + 4 * d * context_tokens / 2
        return (self.layers * layer + 2 * d * LLAMA_VOCAB) / LLAMA_TOKEN_BYTES


def equal_llama(args: BLTArgs, work: Work) -> LlamaShape:
    """Return a Llama as wide as the global transformer that takes as many FLOPs for a byte as the BLT.

    The number of layers is the one that needs the least change of the usual feed-forward width, which then takes up
    what is left.
    """
    wanted = args.forward_flops_per_byte(work.n_bytes, work.patch_bytes)
    dim, usual = args.global_dim, swiglu_hidden(args.global_dim)

    def of_layers(layers: int) -> LlamaShape:
        without = LlamaShape(dim, 0, layers).flops_per_byte(work.n_bytes)
        left = (wanted - without) * LLAMA_TOKEN_BYTES / (layers * 6 * dim)
        return LlamaShape(dim, max(_FFN_MULTIPLE, _FFN_MULTIPLE * round(left / _FFN_MULTIPLE)), layers)

    shapes = [of_layers(layers) for layers in range(1, 4 * (args.global_layers + args.decoder_layers) + 2)]
    return min(shapes, key=lambda shape: abs(shape.ffn_hidden - usual))


@dataclass(frozen=True)
class Product:
    """A product of inputs [M, K] and a weight [N, K], and how often a step has it."""

    m: int
    k: int
    n: int
    times: int


def weight_products(args: BLTArgs, work: Work) -> list[Product]:
    """Return the products with weights that a forward has; attention's own are none of them.

    The products of patches have as many rows as there are patch slots, and keys, values and queries of patches k times
    as many.
    """
    d, G, k = args.local_dim, args.global_dim, args.cross_attn_k
    n_bytes, n_patches = work.rows * work.n_bytes, work.rows * work.patch_slots
    local = args.encoder_layers + args.decoder_layers
    crossings = (args.encoder_layers if args.encoder_cross_attn_all_layers else 1) + (
        args.decoder_layers if args.decoder_cross_attn_all_layers else 1
    )
    products = [
        Product(n_bytes, d, d, 4 * local),
        Product(n_bytes, d, args.local_ffn_hidden, 2 * local),
        Product(n_bytes, args.local_ffn_hidden, d, local),
        Product(n_patches, G, G, 4 * args.global_layers),
        Product(n_patches, G, args.global_ffn_hidden, 2 * args.global_layers),
        Product(n_patches, args.global_ffn_hidden, G, args.global_layers),
        Product(n_bytes, d, d, 2 * crossings),
        Product(n_patches * k, d, d, 2 * crossings),
        Product(n_patches, d, args.patch_dim, 1),
        Product(n_patches, G, args.patch_dim, 1),
        Product(n_bytes, d, VOCAB_SIZE, 1),
    ]
    if args.patch_dim != G:
        products.append(Product(n_patches, args.patch_dim, G, 1))
    return products
