"""Hash n-gram embeddings: each byte also looks up its last n bytes, for several n, in tables of V rows.

One stacked table [T * V, d], one block of V rows per (function, n), function outer, n inner (paper, section
3.2.1). The window restarts at each document, so that training sees what a document alone would give.

    ids 1 76 105 (BOS H e), n = 3, prime p: the window that ends at `e` is (1, 76, 105),
    hash = 1 + 76 p + 105 p^2 in wrapping int64, row = hash mod V (floor, so never negative)

Letters: B rows, S byte slots, T tables, V rows of one table, d local width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

HASH_PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
"""One polynomial base per hash function, in the released models' order."""


class NgramHashes(nn.Module):
    """`ngram_hashes` as a module, which can be compiled by itself: some sixty operations on ids, and no weight."""

    def __init__(self, *, ngrams: Sequence[int], n_functions: int, n_rows: int):
        super().__init__()
        self.ngrams, self.n_functions, self.n_rows = tuple(ngrams), n_functions, n_rows

    def forward(self, ids_BS: torch.Tensor, doc_BS: torch.Tensor) -> torch.Tensor:
        """Hash; the result numbers rows of the stacked tables, int64 [B, S, T]."""
        rows_BST = ngram_hashes(ids_BS, doc_BS, ngrams=self.ngrams, n_functions=self.n_functions, n_rows=self.n_rows)
        return rows_BST + torch.arange(rows_BST.shape[-1], device=ids_BS.device) * self.n_rows


LookUp = Callable[["HashEmbedding", torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Sums of the tables' rows, [B, S, d], for ids and documents [B, T] but for their first T - S, which are only read."""


def ngram_hashes(
    ids_BS: torch.Tensor, doc_BS: torch.Tensor, *, ngrams: Sequence[int], n_functions: int, n_rows: int
) -> torch.Tensor:
    """Hash the n-gram that ends at each byte.

    `h = sum_j w_j * prime^j` over the window w_0..w_{n-1} that ends at the current id, ids before the document
    counted as 0; evaluated by Horner's rule over growing windows, so all n share one pass.

    Args:
        ids_BS: ids, integer [B, S].
        doc_BS: document of each byte, integer [B, S].
        ngrams: window lengths n, ascending.
        n_functions: number of hash functions, at most `len(HASH_PRIMES)`.
        n_rows: V, rows of one table.

    Returns:
        Row in its own table, int64 [B, S, T], function outer, n inner.
    """
    ids_BS = ids_BS.long()
    S = ids_BS.shape[1]
    previous = [ids_BS]
    for back in range(1, max(ngrams)):
        same_document = F.pad(doc_BS, (back, 0), value=-2)[:, :S] == doc_BS
        previous.append(torch.where(same_document, F.pad(ids_BS, (back, 0))[:, :S], 0))
    rows = []
    for prime in HASH_PRIMES[:n_functions]:
        hash_BS = previous[0]
        by_length = {1: hash_BS}
        for back in range(1, max(ngrams)):
            hash_BS = hash_BS * prime + previous[back]
            by_length[back + 1] = hash_BS
        rows += [by_length[n] % n_rows for n in ngrams]
    return torch.stack(rows, dim=-1)


def look_up_whole(embedding: "HashEmbedding", ids_BT: torch.Tensor, doc_BT: torch.Tensor, skip: int) -> torch.Tensor:
    """Look up in tables that one device holds; see `LookUp`."""
    return embedding.sum_rows(ids_BT, doc_BT, skip, embedding.weight)


class HashEmbedding(nn.Module):
    """Sum of T table look-ups per byte. The table holds most parameters of a small BLT and no FLOPs."""

    def __init__(self, dim: int, *, ngrams: Sequence[int], n_functions: int, n_rows: int):
        super().__init__()
        if not ngrams or list(ngrams) != sorted(set(ngrams)) or min(ngrams) < 1:
            raise ValueError(f"hash_ngrams must be ascending lengths from 1 up, got {tuple(ngrams)}")
        if not 1 <= n_functions <= len(HASH_PRIMES):
            raise ValueError(f"hash_functions must be 1 to {len(HASH_PRIMES)}, got {n_functions}")
        self.ngrams = tuple(ngrams)
        self.n_functions = n_functions
        self.n_rows = n_rows
        self.n_tables = n_functions * len(self.ngrams)
        self.hashes = NgramHashes(ngrams=ngrams, n_functions=n_functions, n_rows=n_rows)
        self.weight = nn.Parameter(torch.empty(self.n_tables * n_rows, dim))

    @property
    def reach_bytes(self) -> int:
        """How many bytes before a byte its hashes depend on."""
        return max(self.ngrams) - 1

    def forward(
        self,
        ids_BS: torch.Tensor,
        doc_BS: torch.Tensor,
        before_ids_BR: torch.Tensor | None = None,
        before_doc_BR: torch.Tensor | None = None,
        look_up: LookUp = look_up_whole,
    ) -> torch.Tensor:
        """Look up and sum.

        Args:
            ids_BS: ids, integer [B, S].
            doc_BS: document of each byte, integer [B, S].
            before_ids_BR: ids of the bytes before the first slot, at least `reach_bytes`; None where the row begins.
            before_doc_BR: their documents.
            look_up: where the tables lie.

        Returns:
            Sums over the tables, [B, S, d].
        """
        skip = 0
        if before_ids_BR is not None and before_doc_BR is not None:
            skip = self.reach_bytes
            ids_BS = torch.cat([before_ids_BR[:, before_ids_BR.shape[1] - skip :], ids_BS], dim=1)
            doc_BS = torch.cat([before_doc_BR[:, before_doc_BR.shape[1] - skip :], doc_BS], dim=1)
        return look_up(self, ids_BS, doc_BS, skip)

    def sum_rows(self, ids_BT: torch.Tensor, doc_BT: torch.Tensor, skip: int, weight: torch.Tensor) -> torch.Tensor:
        """Sum the rows of `weight`, which may hold only some columns, for all but the first `skip` bytes."""
        rows_BST = self.hashes(ids_BT, doc_BT)[:, skip:]
        # A bag sums as it reads: [B, S, T, d] is never written.
        summed = F.embedding_bag(rows_BST.flatten(0, 1), weight, mode="sum")
        return summed.view(*rows_BST.shape[:2], -1)
