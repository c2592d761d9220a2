"""Next-byte entropies of documents, in batches that hold no padding to speak of.

Documents enter as ids, entropies in nats leave, one for each id. A batch is a number of *lanes*; a lane is one long
sequence of documents, read `chunk` ids at a time, and what the next chunk's first bytes may see of this one (each
layer's last W - 1 keys and values) is carried along. So a document longer than a chunk costs nothing twice, its
entropies are those of the whole document, and a short one costs its own length:

    lane 0   <s> a b c </s> <s> d | e f g h </s> <s> i | ...        chunk = 7
    lane 1   <s> o n e   l o n  g | d o c u m e  n   t | ...

Lanes take pieces (some whole documents of one request) from one queue as they run dry. Once the queue is empty, lanes
that are done are left out, down to powers of two, if attention is SDPA. FlexAttention would be compiled again for each
number of lanes, so there they stay as padding: a scorer has one shape from its first forward to its last.

Letters: B lanes, C ids of a chunk, W window, H heads, K head size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from blt_titan.batch import PADDING
from blt_titan.byte_vocab import BOS_ID, BOUNDARY_ID
from blt_titan.model.args import EntropyModelArgs
from blt_titan.model.attention import attend, resolve_backend
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rule import PatchRule

LANES, CHUNK = 8, 2048


@dataclass
class _Request:
    """The ids of one request, and its entropies as they come in."""

    key: Any
    entropies: np.ndarray
    missing: int


@dataclass
class _Lane:
    """What a lane still has to read: stretches of ids, each with where its entropies go."""

    pieces: deque[tuple[_Request, np.ndarray, int]] = field(default_factory=deque)
    waiting: int = 0

    def take(self, count: int) -> list[tuple[_Request, np.ndarray, int]]:
        """Take up to `count` ids from the front."""
        taken = []
        while count and self.pieces:
            request, ids, begin = self.pieces.popleft()
            if len(ids) > count:
                self.pieces.appendleft((request, ids[count:], begin + count))
                ids = ids[:count]
            taken.append((request, ids, begin))
            count -= len(ids)
            self.waiting -= len(ids)
        return taken


class _CarriedAttention:
    """Attention of one layer that also sees the last W keys and values of the chunk before."""

    def __init__(self, window: int):
        self.before = window
        self.kv_BWHX: torch.Tensor | None = None

    def __call__(self, q_BCHK: torch.Tensor, k_BCHK: torch.Tensor, v_BCHK: torch.Tensor, mask: Any) -> torch.Tensor:
        kv_BCHX = torch.cat([k_BCHK, v_BCHK], dim=-1)
        if self.kv_BWHX is None:
            self.kv_BWHX = kv_BCHX.new_zeros(kv_BCHX.shape[0], self.before, *kv_BCHX.shape[2:])
        kv_BTHX = torch.cat([self.kv_BWHX, kv_BCHX], dim=1)
        # A copy: a view would keep the whole chunk.
        self.kv_BWHX = kv_BTHX[:, kv_BTHX.shape[1] - self.before :].clone()
        k, v = kv_BTHX.chunk(2, dim=-1)
        return attend(q_BCHK, k, v, mask)

    def keep(self, lanes: torch.Tensor) -> None:
        """Leave only these lanes, int64 [B'], by number."""
        if self.kv_BWHX is not None:
            self.kv_BWHX = self.kv_BWHX[lanes.to(self.kv_BWHX.device)]


class _Carried:
    """What lanes carry from chunk to chunk."""

    def __init__(self, args: EntropyModelArgs, lanes: int):
        self.attention = [_CarriedAttention(args.window) for _ in range(args.n_layers)]
        # Documents are told apart by numbers that grow along a lane; 0 is nothing's.
        self.context_BW = torch.full((lanes, args.window), PADDING, dtype=torch.int64)
        self.last_context_B1 = torch.zeros(lanes, 1, dtype=torch.int64)
        self.position = 0

    def keep(self, lanes: torch.Tensor) -> None:
        """Leave only these lanes, int64 [B'], by number."""
        self.context_BW, self.last_context_B1 = self.context_BW[lanes], self.last_context_B1[lanes]
        for carried in self.attention:
            carried.keep(lanes)


class EntropyScorer:
    """Scores documents with an entropy model, which is only read.

    Args:
        model: in the dtype and on the device that it shall compute with. Entropies are computed in fp32.
        lanes: B, sequences of a batch.
        chunk: C, ids of a lane in one forward.
    """

    def __init__(self, model: EntropyModel, *, lanes: int = LANES, chunk: int = CHUNK):
        self.model = model
        self.lanes = lanes
        self.chunk = chunk
        self.slots_run = 0
        """Byte slots computed so far, padding included."""
        self.device = model.tok_embeddings.weight.device
        self._keeps_lanes = resolve_backend(model.args.attention_backend, self.device) == "flex"

    def score(self, ids: np.ndarray) -> np.ndarray:
        """Return H[i], nats of the byte that follows ids[i]: documents' ids, integer [N] -> fp32 [N]."""
        [(_, entropies)] = self.score_all([(None, ids)])
        return entropies

    @torch.no_grad()
    def score_all(self, requests: Iterable[tuple[Any, np.ndarray]]) -> Iterator[tuple[Any, np.ndarray]]:
        """Score many requests with full lanes across their borders.

        Args:
            requests: a key and the ids [N] of whole documents (BOS, bytes, EOS), or of one that lacks its end; read as
                lanes run dry.

        Yields:
            The key and the entropies, fp32 [N], of each request as it is finished, not always in order.
        """
        pieces, finished = self._pieces(iter(requests)), deque[_Request]()
        lanes = [_Lane() for _ in range(self.lanes)]
        carried = _Carried(self.model.args, self.lanes)
        while True:
            for lane in lanes:
                while lane.waiting < self.chunk and (piece := next(pieces, None)) is not None:
                    lane.pieces.append(piece)
                    lane.waiting += len(piece[1])
            busy = [number for number, lane in enumerate(lanes) if lane.waiting]
            if not busy:
                return
            enough = 1 << (len(busy) - 1).bit_length()
            if enough < len(lanes) and not self._keeps_lanes:
                idle = [number for number, lane in enumerate(lanes) if not lane.waiting]
                kept = torch.tensor(sorted(busy + idle[: enough - len(busy)]))
                lanes = [lanes[number] for number in kept.tolist()]
                carried.keep(kept)
            taken = [lane.take(self.chunk) for lane in lanes]
            ids_BC = torch.full((len(lanes), self.chunk), BOUNDARY_ID, dtype=torch.int64)
            real_BC = torch.zeros(len(lanes), self.chunk, dtype=torch.bool)
            for number, stretches in enumerate(taken):
                together = np.concatenate([ids for _, ids, _ in stretches]) if stretches else np.empty(0, np.int64)
                ids_BC[number, : len(together)] = torch.from_numpy(together.astype(np.int64))
                real_BC[number, : len(together)] = True
            entropies_BC = self._forward(ids_BC, real_BC, carried)
            for number, stretches in enumerate(taken):
                done = 0
                for request, ids, begin in stretches:
                    request.entropies[begin : begin + len(ids)] = entropies_BC[number, done : done + len(ids)]
                    request.missing -= len(ids)
                    done += len(ids)
                    if not request.missing:
                        finished.append(request)
            while finished:
                request = finished.popleft()
                yield request.key, request.entropies

    def _pieces(self, requests: Iterator[tuple[Any, np.ndarray]]) -> Iterator[tuple[_Request, np.ndarray, int]]:
        """Cut requests into whole documents, together about a chunk."""
        for key, ids in requests:
            assert len(ids), "nothing to score"
            request = _Request(key, np.empty(len(ids), np.float32), len(ids))
            begins = np.flatnonzero(ids == BOS_ID)
            # The first document at or after each multiple of a chunk begins a piece.
            wanted = np.arange(self.chunk, len(ids), self.chunk)
            cuts = begins[np.minimum(np.searchsorted(begins, wanted), len(begins) - 1)] if len(begins) else begins
            cuts = np.unique(np.concatenate([[0], cuts, [len(ids)]]))
            for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                yield request, ids[begin:end], begin

    def _forward(self, ids_BC: torch.Tensor, real_BC: torch.Tensor, carried: _Carried) -> np.ndarray:
        """Read the next chunk of each lane: ids, and which of them are no padding; return entropies, fp32 [B, C]."""
        model = self.model
        self.slots_run += ids_BC.numel()
        document_BC = carried.last_context_B1 + (ids_BC == BOS_ID).cumsum(1)
        context_BC = model.contexts(ids_BC, document_BC)
        carried.last_context_B1 = context_BC[:, -1:]
        context_BC = torch.where(real_BC, context_BC, PADDING)
        pos_BC = torch.arange(carried.position, carried.position + self.chunk, device=self.device).expand_as(ids_BC)
        rotation, mask = model.rotation_and_mask(pos_BC, context_BC.to(self.device), carried.context_BW.to(self.device))
        # A run may score inside an autocast of its own, and must not get other entropies there.
        with torch.autocast(self.device.type, enabled=False):
            logits_BCV = model.run(ids_BC.to(self.device), rotation, mask, carried.attention)
            entropies_BC = entropy_nats(logits_BCV).cpu().numpy()
        carried.context_BW = torch.cat([carried.context_BW, context_BC], dim=1)[:, context_BC.shape[1] :]
        carried.position += self.chunk
        return entropies_BC


def mark_by_model(scorer: EntropyScorer, rule: PatchRule) -> Callable[[np.ndarray], np.ndarray]:
    """Return a rule by entropy as a function of the ids [N] of a document's beginning; the model scores them.

    It also marks the position after the last: bool [N + 1].
    """

    def mark(ids: np.ndarray) -> np.ndarray:
        return rule.mark(ids, rule.rounded(scorer.score(ids)), include_next=True)

    return mark


def entropy_nats(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the distributions that logits [..., V] stand for, fp32 [...], in nats."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
