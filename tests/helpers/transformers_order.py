"""Have a BLT compute as `transformers` does, operation by operation, so that the two round alike.

Our layers and those of `transformers` are one function of the weights, but not one sequence of roundings: we cut the
window into blocks, leave out the patches after a query, attend between bytes and patches by index, add up hash
embeddings in one bag, take norms in one pass, rotate by complex numbers, and make the angles in fp64. In fp32 that
leaves differences, which trained weights amplify (to 3e-5 in a small model) though nothing is wrong. With these seven
replaced by what `transformers` does, and nothing else, logits agree bit for bit on a CPU.

So what `blt-titan export --verify` does not hold to a tolerance, logits in fp32, is held to one here: `compare_fp32`.
The masks made here are dense.

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), T hash tables, Q those that
ask and R those that are read, K head size.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from blt_titan import BLT, ByteTokenizer
from blt_titan.byte_vocab import EOS_ID
from blt_titan.hf.pretrained import Pretrained
from blt_titan.hf.verify.precision import CastsTo, compute_in_both, largest_difference
from blt_titan.hf.verify.verify import cut_text, longer_than_windows, run_transformers
from blt_titan.model.attention import AttentionMask, DenseMask, attend, dense_mask
from blt_titan.model.blt import BLT as BareBLT
from blt_titan.model.cross_attention import CrossAttention, PatchRuns
from blt_titan.model.eager import RMSNorm
from blt_titan.model.hash_embedding import HashEmbedding, ngram_hashes
from blt_titan.model.layers import Attention, Rotation

LOGITS_ATOL = 1e-5
"""How far logits in fp32 may be apart in the order of operations of transformers on both sides; 0 is usual."""
ROUNDING_RATIO = 2.0
"""Our logits in fp32, in our own order, may lie this many times further from those in fp64 than dense masks and sums
in turn leave them, as root of mean squares. How far that is, is up to the weights, which amplify rounding; 162 small
random models gave ratios of 0.7 to 1.5, a step cut to 16 bits up to 30, to 12 bits from 15 to 500."""


class Comparison(NamedTuple):
    """Logits in fp32 beside those of `transformers`."""

    same_order_error: float
    """The largest difference, with the order of operations of `transformers` on both sides."""
    own_order_error: float
    """The largest difference, each in its own order."""


def compare_fp32(directory: Path) -> Comparison:
    """Compare the logits of an exported BLT in fp32, on the text and the patches that verification takes.

    Raises:
        AssertionError: they differ though both compute in one order, or our own order loses more than rounding does.
    """
    pretrained = Pretrained(directory)
    text = longer_than_windows(pretrained)
    ids = ByteTokenizer().encode(text)
    cut = cut_text(pretrained, np.array(ids))
    theirs = run_transformers(pretrained, text, ids, cut).logits[0]
    ours = BLT.from_pretrained(directory)
    ids_1S, lengths_1P = torch.tensor([ids]), torch.from_numpy(cut.lengths)[None]
    ordered = in_transformers_order(ours)
    with torch.no_grad():
        dense = ordered.logits(ids_1S, lengths_1P)
        with CastsTo(torch.float32):
            same_order = ordered.logits(ids_1S, lengths_1P)
    fp32, fp64 = compute_in_both(ours, lambda: ours.logits(ids_1S, lengths_1P))
    same_order_error = largest_difference(same_order, theirs)
    assert same_order_error <= LOGITS_ATOL, (
        f"logits in fp32 differ by {same_order_error:.1e}, allowed are {LOGITS_ATOL:.1e}, though both compute in one "
        "order"
    )
    least = torch.finfo(torch.float32).eps * max(1.0, float(fp64.abs().max()))
    rounding, allowed = _root_mean_square(fp32, fp64), ROUNDING_RATIO * max(_root_mean_square(dense, fp64), least)
    assert rounding <= allowed, (
        f"our logits in fp32 are {rounding:.1e} (root of mean squares) from those in fp64, allowed are {allowed:.1e}"
    )
    return Comparison(same_order_error, largest_difference(fp32, theirs))


def _root_mean_square(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def in_transformers_order(model: BareBLT) -> Any:
    """Return a BLT of the same parameters with dense masks and sums in turn, for rows of one document each.

    Under `CastsTo(torch.float32)`, which makes the angles in fp32 too, it rounds where `transformers` rounds.

    Args:
        model: whole, in fp32; is left as it is.
    """
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    model = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    model.args = replace(model.args, attention_backend="sdpa")
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = nn.RMSNorm
        elif isinstance(module, Attention):
            module.__class__ = _AttentionOfReals
    encoder: Any = model.encoder
    encoder.cross_attention = nn.ModuleList(_DensePatchesReadBytes(inner) for inner in encoder.cross_attention)
    decoder: Any = model.decoder
    decoder.cross_attention = nn.ModuleList(_DenseBytesReadPatches(inner) for inner in decoder.cross_attention)
    encoder.tok_embeddings = _SequentialEmbeddings(encoder.tok_embeddings, model.hash_embedding)
    model.placement = replace(
        model.placement,
        attend_bytes=_DenseWindowAttention(model.args.local_window),
        attend_patches=_attend_to_all,
        look_up=_added_to_bytes,
    )
    return model


def _added_to_bytes(embedding: HashEmbedding, ids_BS: torch.Tensor, doc_BS: torch.Tensor, skip: int) -> torch.Tensor:
    """Look up nothing: `_SequentialEmbeddings` has added the tables' rows already."""
    return torch.zeros((), device=ids_BS.device)


def _attend_to_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: DenseMask) -> torch.Tensor:
    """Attend to all patches under the mask, where ours leaves out those after the query: its sums are shorter."""
    return attend(q, k, v, replace(mask, is_causal=False))


class _AttentionOfReals(Attention):
    """Rotates pairs as real numbers, where ours multiplies complex ones."""

    def forward(self, x_BSD: torch.Tensor, rotation: Rotation, mask: AttentionMask, attend: Any) -> torch.Tensor:
        cos, sin = rotation

        def rotated(x_BSHK: torch.Tensor) -> torch.Tensor:
            even, odd = x_BSHK.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

        q, k, v = (w(x_BSD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return self.wo(attend(rotated(q), rotated(k), v, mask).flatten(-2))


class _DenseWindowAttention:
    """Attention over bytes under one S x S mask, where ours takes blocks."""

    def __init__(self, window: int):
        self.window = window

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        slot_S = torch.arange(q.shape[1], device=q.device)
        back_SS = slot_S[:, None] - slot_S
        return attend(q, k, v, dense_mask(((back_SS >= 0) & (back_SS < self.window))[None, None]))


class _DenseCrossAttention(nn.Module):
    def __init__(self, inner: CrossAttention):
        super().__init__()
        self.inner = inner

    def read(self, asking_BQd: torch.Tensor, read_BRd: torch.Tensor, visible_BQR: torch.Tensor) -> torch.Tensor:
        inner = self.inner
        normed = inner.kv_norm(read_BRd)
        q, k, v = (
            x.unflatten(-1, (inner.n_heads, -1)).transpose(1, 2)
            for x in (inner.wq(inner.q_norm(asking_BQd)), inner.wk(normed), inner.wv(normed))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BQR[:, None])
        return asking_BQd + inner.wo(out.transpose(1, 2).flatten(2))


class _DensePatchesReadBytes(_DenseCrossAttention):
    """What `PatchesReadBytes` computes, under a [B, P * k, S] mask."""

    def forward(self, patch_BPNd: torch.Tensor, byte_BSd: torch.Tensor, runs: PatchRuns) -> torch.Tensor:
        P, N = patch_BPNd.shape[1:3]
        patch_P1 = torch.arange(P, device=patch_BPNd.device)[:, None]
        visible_BQS = (runs.patch_BS[:, None] == patch_P1).repeat_interleave(N, dim=1)
        return self.read(patch_BPNd.flatten(1, 2), byte_BSd, visible_BQS).unflatten(1, (P, N))


class _DenseBytesReadPatches(_DenseCrossAttention):
    """What `BytesReadPatches` computes, under a [B, S, P * k] mask."""

    def forward(self, byte_BSd: torch.Tensor, patch_BPNd: torch.Tensor, sources: PatchRuns) -> torch.Tensor:
        P, N = patch_BPNd.shape[1:3]
        patch_P = torch.arange(P, device=byte_BSd.device)
        visible_BSR = (sources.patch_BS[..., None] == patch_P).repeat_interleave(N, dim=2)
        return self.read(byte_BSd, patch_BPNd.flatten(1, 2), visible_BSR)


class _SequentialEmbeddings(nn.Module):
    """A byte's embedding, to which the row of each table is added in turn."""

    def __init__(self, bytes_embedding: nn.Embedding, hash_embedding: HashEmbedding):
        super().__init__()
        self.bytes_embedding, self.hash_embedding = bytes_embedding, hash_embedding

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        if bool((ids_BS[:, :-1] == EOS_ID).any()):
            raise ValueError("a row holds a second document, which transformers does not know")
        hashes = self.hash_embedding
        rows_BST = ngram_hashes(
            ids_BS,
            torch.zeros_like(ids_BS),
            ngrams=hashes.ngrams,
            n_functions=hashes.n_functions,
            n_rows=hashes.n_rows,
        )
        sum_BSd = self.bytes_embedding(ids_BS)
        for table in range(hashes.n_tables):
            sum_BSd = sum_BSd + F.embedding(rows_BST[..., table] + table * hashes.n_rows, hashes.weight)
        return sum_BSd
