"""How likely a BLT finds texts: nats of every byte of a document, with a sliding context.

Entropies, and with them patches, are those of the whole document, as in training. A document that is longer than the
context is read in windows, each byte once, with at least `context - stride` bytes before it:

    context 8, stride 4     0 1 2 3 4 5 6 7            scored 1 .. 7 (and 8)
                                    4 5 6 7 8 9 ..     scored 9 .. (what was scored before is context)

A window begins as a row in training does that a border cut: its first two positions begin patches.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from blt_titan.byte_vocab import BYTE_OFFSET, EOS_ID, VOCAB_SIZE
from blt_titan.inference.rows import MarkedIds, layout_rows, pad_ids
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer

CONTEXT_BYTES = 8192
_BATCH_SLOTS = 16_384
_WAITING_WINDOWS = 64


class Likelihood(NamedTuple):
    """How likely the ids of a document after its first are."""

    nats: np.ndarray
    """-log p of each id given those before, fp32 [N - 1]."""
    likeliest: np.ndarray
    """Whether no other byte, nor EOS, was likelier, bool [N - 1]."""
    patches: int
    """Patches of the whole document."""


class LikelihoodScorer:
    """Scores documents; models are only read.

    Args:
        model: on its device.
        rule: where patches begin.
        entropy_model: of rules by entropy.
        context_bytes: positions of a window.
        stride_bytes: by how much windows move on; default half the context.

    Raises:
        ValueError: a size cannot be used, or the rule and the entropy model do not go together.
    """

    def __init__(
        self,
        model: BLT,
        rule: PatchRule,
        entropy_model: EntropyModel | None = None,
        *,
        context_bytes: int = CONTEXT_BYTES,
        stride_bytes: int | None = None,
    ):
        stride_bytes = max(1, context_bytes // 2) if stride_bytes is None else stride_bytes
        if context_bytes < 2 or not 1 <= stride_bytes <= context_bytes:
            raise ValueError(
                f"context of {context_bytes} bytes, stride of {stride_bytes}: the context must be at least 2, the "
                "stride from 1 to the context"
            )
        rule.require(entropy_model=entropy_model is not None)
        self.model, self.rule = model, rule
        self.context_bytes, self._stride = context_bytes, stride_bytes
        self._scorer = None if entropy_model is None else EntropyScorer(entropy_model)
        self._device = model.decoder.output.weight.device
        allowed_V = torch.arange(VOCAB_SIZE, device=self._device)
        self._allowed_V = (allowed_V >= BYTE_OFFSET) | (allowed_V == EOS_ID)

    def score(self, documents: Iterable[np.ndarray]) -> Iterator[tuple[int, Likelihood]]:
        """Score documents.

        Args:
            documents: ids, each beginning with BOS, integers [N], N at least 2; an EOS at the end is a target too.

        Yields:
            The number of a document and its likelihood, not always in order.
        """
        waiting: list[tuple[_Document, int, int, int]] = []
        for document in self._marked(documents):
            waiting += document.windows(self.context_bytes, self._stride)
            while len(waiting) >= _WAITING_WINDOWS:
                yield from self._some(waiting)
        while waiting:
            yield from self._some(waiting)

    def _marked(self, documents: Iterable[np.ndarray]) -> Iterator["_Document"]:
        """Cut documents into patches."""
        numbered = enumerate(documents)
        if self._scorer is None:
            for number, ids in numbered:
                yield _Document(number, ids, self.rule.mark(ids[:-1], include_next=True))
            return
        for (number, ids), entropies in self._scorer.score_all((pair, pair[1]) for pair in numbered):
            rounded = self.rule.rounded(entropies[:-1])
            yield _Document(number, ids, self.rule.mark(ids[:-1], rounded, include_next=True))

    @torch.no_grad()
    def _some(self, waiting: list[tuple["_Document", int, int, int]]) -> Iterator[tuple[int, Likelihood]]:
        """Score the longest windows that wait, as many as a batch holds."""
        waiting.sort(key=lambda window: window[2] - window[1])
        longest = waiting[-1][2] - waiting[-1][1]
        count = max(1, min(len(waiting), _BATCH_SLOTS // longest))
        batch, waiting[:] = waiting[-count:], waiting[:-count]
        rows = [document.row(begin, end) for document, begin, end, _ in batch]
        ids_BS = pad_ids([row.ids for row in rows])
        layout = layout_rows(rows).map(lambda tensor: tensor.to(self._device))
        logits_BSV = self.model(torch.from_numpy(ids_BS).to(self._device), layout)
        targets_BS = np.zeros_like(ids_BS)
        for row, (document, begin, end, _) in enumerate(batch):
            targets_BS[row, : end - begin] = document.ids[begin + 1 : end + 1]
        targets = torch.from_numpy(targets_BS).to(self._device)
        nats_BS = F.cross_entropy(logits_BSV.transpose(1, 2), targets, reduction="none")
        best_BS = logits_BSV.masked_fill(~self._allowed_V, -torch.inf).argmax(-1)
        nats, likeliest = nats_BS.cpu().numpy(), (best_BS == targets).cpu().numpy()
        for row, (document, begin, end, first) in enumerate(batch):
            scored = slice(first - begin, end - begin)
            document.nats[first:end], document.likeliest[first:end] = nats[row, scored], likeliest[row, scored]
            document.left -= 1
            if not document.left:
                yield document.number, Likelihood(document.nats, document.likeliest, document.patches)


class _Document:
    """A document that is being scored."""

    def __init__(self, number: int, ids: np.ndarray, starts: np.ndarray):
        assert len(ids) > 1
        self.number, self.ids, self.starts = number, ids, starts
        self.patches = int(starts.sum())
        self.nats, self.likeliest = np.empty(len(ids) - 1, np.float32), np.empty(len(ids) - 1, bool)
        self.left = 0

    def windows(self, context: int, stride: int) -> list[tuple["_Document", int, int, int]]:
        """Return (this, first input, after the last, first that is scored) of each window."""
        n, windows, scored = len(self.ids) - 1, [], 0
        begin = 0
        while scored < n:
            end = min(n, begin + context)
            windows.append((self, begin, end, scored))
            scored, begin = end, begin + stride
        self.left = len(windows)
        return windows

    def row(self, begin: int, end: int) -> MarkedIds:
        starts = self.starts[begin : end + 1].copy()
        starts[:2] = True
        return MarkedIds(self.ids[begin:end], starts)
