"""Validation during training: the held-out split, each byte once, the same figure in every layout."""

import itertools
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

import blt_titan.titan_device  # noqa: F401

# isort: split
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from blt_titan.data.loader import HeldOutRows
from blt_titan.inference.evaluate import score_batches
from blt_titan.metrics import BLTMetrics


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
    ):
        super().__init__(job_config)
        self.rows = rows
        self.loss_mesh = parallel_dims.get_optional_mesh("loss")
        self.metrics = metrics
        self.autocast = autocast

    def should_validate(self, step: int) -> bool:
        """Tell whether to validate after `step`."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Score the held-out rows and log the figure; collective over ranks."""
        began = time.perf_counter()
        (model,) = model_parts
        steps = self.job_config.validation.steps
        model.eval()
        with self.autocast:
            score = score_batches(
                model,
                itertools.islice(self.rows, None if steps < 0 else steps),
                device=device_type,
                reduce=self._sum_over_ranks if self.loss_mesh is not None else None,
            )
        model.train()
        self.metrics.log_held_out(
            step,
            bits_per_byte=score.bits_per_byte,
            loss_nats=score.loss_nats,
            seconds=time.perf_counter() - began,
        )

    def _sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        assert self.loss_mesh is not None
        dist.all_reduce(sums, group=self.loss_mesh.get_group())
        return sums
