"""Validation during training: the held-out split, each byte once, the same figure in every layout."""

import time
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

import blt_titan.titan  # noqa: F401

# isort: split
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from blt_titan.batch import Batch
from blt_titan.data.rows.held_out import HeldOutRows
from blt_titan.evaluation.rows import batch_scorer, batch_sums, score_batches
from blt_titan.loss import ByteCrossEntropy
from blt_titan.training.metrics import BLTMetrics


class BLTValidator(BaseValidator):
    """Scores the held-out rows every `validation.freq` steps and after the last."""

    def __init__(
        self,
        job_config: Any,
        rows: HeldOutRows,
        *,
        parallel_dims: ParallelDims,
        metrics: BLTMetrics,
        autocast: AbstractContextManager,
        loss_fn: ByteCrossEntropy,
        pp_schedule: Any,
        has_first_stage: bool,
        has_last_stage: bool,
    ):
        super().__init__(job_config)
        self.rows = rows
        self.n_ranks = parallel_dims.world_size
        self.metrics = metrics
        self.autocast = autocast
        self.loss_fn = loss_fn
        self.pp_schedule = pp_schedule
        self.has_first_stage = has_first_stage
        self.has_last_stage = has_last_stage

    def should_validate(self, step: int) -> bool:
        """Tell whether to validate after `step`."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Score the held-out rows and log the figure; collective over ranks."""
        began = time.perf_counter()
        for model in model_parts:
            model.eval()
        with self.autocast:
            score = score_batches(
                self._score_by_schedule if self.pp_schedule is not None else batch_scorer(model_parts[0]),
                self.rows,
                device=device_type,
                reduce=self._sum_over_ranks if self.n_ranks > 1 else None,
            )
        for model in model_parts:
            model.train()
        self.metrics.log_held_out(
            step,
            bits_per_byte=score.bits_per_byte,
            loss_nats=score.loss_nats,
            seconds=time.perf_counter() - began,
        )

    def _score_by_schedule(self, batch: Batch) -> torch.Tensor:
        """Score a batch through all pipeline stages; the ranks of the last one have the sums."""
        ids_BS, layout, labels_BS = batch
        loss_fn = self.loss_fn
        loss_fn.n_targets, loss_fn.eos_nats = 1.0, None
        losses: list[torch.Tensor] = []
        self.pp_schedule.eval(
            *((ids_BS,) if self.has_first_stage else ()),
            layout=layout,
            **({"target": labels_BS, "losses": losses} if self.has_last_stage else {}),
        )
        if not self.has_last_stage:
            return torch.zeros(4, dtype=torch.float64, device=labels_BS.device)
        assert loss_fn.eos_nats is not None
        return batch_sums(torch.stack(losses).sum(), loss_fn.eos_nats, labels_BS)

    def _sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(sums if self.has_last_stage else sums.zero_())
        return sums
