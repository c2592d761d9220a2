"""Have a BLT compute as `transformers` does, operation by operation, so that the two round alike.

Our layers and those of `transformers` are one function of the weights, but not one sequence of roundings: we cut the
window into blocks, attend between bytes and patches by index, add up hash embeddings in one bag, and make rotary angles
in fp64. In fp32 that leaves differences, which trained weights amplify (to 3e-5 in a small model) though nothing is
wrong. With these four replaced by what `transformers` does, and nothing else, logits agree bit for bit on a CPU.

For comparing alone: the masks made here are dense.

Letters: B rows, S byte slots, P patch slots, d local width, k slots of a patch (written N), T hash tables, Q those that
ask and R those that are read, K head size.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from blt_titan.byte_vocab import EOS_ID
from blt_titan.model.attention import AttentionMask, DenseMask, attend
from blt_titan.model.blt import BLT
from blt_titan.model.cross_attention import CrossAttention
from blt_titan.model.hash_embedding import HashEmbedding, ngram_hashes


class FloatsAre(TorchFunctionMode):
    """Makes one type of every fp32 and fp64 that code asks for by name, as norms, softmax and rotary angles do.

    It sees `.float()`, `.double()` and a dtype that is an argument itself, not one inside a list.

    Args:
        dtype: torch.float32 or torch.float64.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.cast = torch.Tensor.double if dtype == torch.float64 else torch.Tensor.float

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.double):
            func = self.cast
        changed = {key: self._change(value) for key, value in (kwargs or {}).items()}
        return func(*map(self._change, args), **changed)

    def _change(self, argument: Any) -> Any:
        return self.dtype if argument is torch.float32 or argument is torch.float64 else argument


def in_transformers_order(model: BLT) -> BLT:
    """Return a BLT of the same parameters with dense masks and sums in turn, for rows of one document each.

    Under `FloatsAre(torch.float32)`, which makes the angles in fp32 too, it rounds where `transformers` rounds.

    Args:
        model: whole, in fp32; is left as it is.
    """
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    model = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    model.args = replace(model.args, attention_backend="sdpa")
    encoder: Any = model.encoder
    encoder.cross_attention = nn.ModuleList(_DensePatchesReadBytes(inner) for inner in encoder.cross_attention)
    decoder: Any = model.decoder
    decoder.cross_attention = nn.ModuleList(_DenseBytesReadPatches(inner) for inner in decoder.cross_attention)
    encoder.tok_embeddings = _EmbeddingsInTurn(encoder.tok_embeddings, model.hash_embedding)
    model.placement = replace(
        model.placement, attend_bytes=_DenseWindow(model.args.local_window), look_up=_added_to_bytes
    )
    return model


def _added_to_bytes(embedding: HashEmbedding, ids_BS: torch.Tensor, doc_BS: torch.Tensor, skip: int) -> torch.Tensor:
    """Look up nothing: `_EmbeddingsInTurn` has added the tables' rows already."""
    return torch.zeros((), device=ids_BS.device)


class _DenseWindow:
    """Attention over bytes under one S x S mask, where ours takes blocks."""

    def __init__(self, window: int):
        self.window = window

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        slot_S = torch.arange(q.shape[1], device=q.device)
        back_SS = slot_S[:, None] - slot_S
        return attend(q, k, v, DenseMask(((back_SS >= 0) & (back_SS < self.window))[None, None]))


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

    def forward(self, patch_BPNd: torch.Tensor, byte_BSd: torch.Tensor, byte_patch_BS: torch.Tensor) -> torch.Tensor:
        P, N = patch_BPNd.shape[1:3]
        patch_P1 = torch.arange(P, device=byte_patch_BS.device)[:, None]
        visible_BQS = (byte_patch_BS[:, None] == patch_P1).repeat_interleave(N, dim=1)
        return self.read(patch_BPNd.flatten(1, 2), byte_BSd, visible_BQS).unflatten(1, (P, N))


class _DenseBytesReadPatches(_DenseCrossAttention):
    """What `BytesReadPatches` computes, under a [B, S, P * k] mask."""

    def forward(self, byte_BSd: torch.Tensor, patch_BPNd: torch.Tensor, source_patch_BS: torch.Tensor) -> torch.Tensor:
        P, N = patch_BPNd.shape[1:3]
        patch_P = torch.arange(P, device=source_patch_BS.device)
        visible_BSR = (source_patch_BS[..., None] == patch_P).repeat_interleave(N, dim=2)
        return self.read(byte_BSd, patch_BPNd.flatten(1, 2), visible_BSR)


class _EmbeddingsInTurn(nn.Module):
    """A byte's embedding, to which the row of each table is added in turn."""

    def __init__(self, of_bytes: nn.Embedding, of_hashes: HashEmbedding):
        super().__init__()
        self.of_bytes, self.of_hashes = of_bytes, of_hashes

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        if bool((ids_BS[:, :-1] == EOS_ID).any()):
            raise ValueError("a row holds a second document, which transformers does not know")
        hashes = self.of_hashes
        rows_BST = ngram_hashes(
            ids_BS,
            torch.zeros_like(ids_BS),
            ngrams=hashes.ngrams,
            n_functions=hashes.n_functions,
            n_rows=hashes.n_rows,
        )
        sum_BSd = self.of_bytes(ids_BS)
        for table in range(hashes.n_tables):
            sum_BSd = sum_BSd + F.embedding(rows_BST[..., table] + table * hashes.n_rows, hashes.weight)
        return sum_BSd
