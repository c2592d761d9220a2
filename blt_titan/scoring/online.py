"""Entropies of record batches, made while a run trains: `patching.source = "online"`."""

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from blt_titan.checkpoint.load import load_entropy_model
from blt_titan.data.rows.packing import frame_documents
from blt_titan.data.store.shards import RecordBatch
from blt_titan.data.store.sidecars import fingerprint_of
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rounding import Storage, from_storage, to_storage
from blt_titan.scoring.entropies import EntropyScorer
from blt_titan.scoring.score_data import sidecar_settings

Share = Callable[[Callable[[], np.ndarray], RecordBatch], np.ndarray]
"""Gives all ranks that read the same rows the entropies of a record batch, which the function makes on one of them."""


class OnlineEntropies:
    """Entropies of a record batch, made when it is asked for.

    Rounded, so that patches begin where a sidecar of the same model puts them.

    Args:
        scorer: of the frozen entropy model.
        fingerprint: of the model, as `EntropySidecars` has it.
        share: where several ranks read the same rows, which must not differ by a rounding; None where one does.
    """

    storage: Storage = "float16"

    def __init__(self, scorer: EntropyScorer, share: Share | None = None, fingerprint: str = ""):
        self.scorer = scorer
        self.fingerprint = fingerprint
        self.share = share
        self.seconds = 0.0
        """Spent so far, waiting for the rank that scores included."""

    def __call__(self, batch: RecordBatch) -> np.ndarray:
        """Score a record batch: fp32 [text bytes]; collective over the ranks that share it."""
        began = time.perf_counter()

        def make() -> np.ndarray:
            ids, is_byte = frame_documents(batch.text, batch.offsets)
            return from_storage(to_storage(self.scorer.score(ids)[is_byte], self.storage))

        entropies = self.share(make, batch) if self.share else make()
        self.seconds += time.perf_counter() - began
        return entropies


def online_entropies(checkpoint: str, *, device: torch.device | str, share: Share | None = None) -> OnlineEntropies:
    """Return what scores with the entropy model of a checkpoint; splits of one process share the model.

    Args:
        checkpoint: of an entropy model, or the folder of its run.
        device: to score on.
        share: as of `OnlineEntropies`.

    Raises:
        CheckpointError: the entropy model cannot be loaded.
    """
    return OnlineEntropies(_scorer(checkpoint, str(device)), share, online_model(checkpoint)[1])


@cache
def _scorer(checkpoint: str, device: str) -> EntropyScorer:
    return EntropyScorer(online_model(checkpoint)[0].to(device))


@cache
def online_model(checkpoint: str) -> tuple[EntropyModel, str]:
    """Load the entropy model that a run scores with, and make its fingerprint: once in a process, and kept.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    model = load_entropy_model(checkpoint)
    return model, fingerprint_of(sidecar_settings(model, OnlineEntropies.storage, "float32"))
