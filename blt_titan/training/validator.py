"""Validation during training: the held-out split, each byte once, the same figure in every layout."""

import time
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from blt_titan.batch import Batch
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.documents import few_documents
from blt_titan.data.rows.held_out import HeldOutRows
from blt_titan.evaluation.rows import batch_scorer, batch_sums, score_batches
from blt_titan.loss import ByteCrossEntropy
from blt_titan.titan import BaseValidator, ParallelDims, device_type, logger
from blt_titan.training.heartbeat import Heartbeat
from blt_titan.training.loader import context_slice, most_documents, split_source
from blt_titan.training.metrics import BLTMetrics


class BLTValidator(BaseValidator):
    """Scores the held-out rows every `validation.freq` steps and after the last."""

    heartbeat: Heartbeat | None = None
    """Is told of each batch."""

    def __init__(
        self,
        job_config: RunConfig,
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
        self.most_documents = most_documents(job_config)
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
        batches = few_documents(self.rows, self.most_documents)
        if self.heartbeat is not None:
            self.heartbeat.at("validate")
            batches = self.heartbeat.each(batches, "validate")
        for model in model_parts:
            model.eval()
        with self.autocast:
            score = score_batches(
                self._score_by_schedule if self.pp_schedule is not None else batch_scorer(model_parts[0]),
                batches,
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
        losses: list[torch.Tensor] = []
        with self.loss_fn.step(1.0) as sums:
            self.pp_schedule.eval(
                *((ids_BS,) if self.has_first_stage else ()),
                layout=layout,
                **({"target": labels_BS, "losses": losses} if self.has_last_stage else {}),
            )
        if not self.has_last_stage:
            return torch.zeros(4, dtype=torch.float64, device=labels_BS.device)
        assert sums.eos_nats is not None
        return batch_sums(torch.stack(losses).sum(), sums.eos_nats, labels_BS)

    def _sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(sums if self.has_last_stage else sums.zero_())
        return sums


def build_validator(
    *,
    job_config: RunConfig,
    dp_world_size: int,
    dp_rank: int,
    parallel_dims: ParallelDims,
    metrics_processor: Any,
    **context,
) -> BLTValidator:
    """Build the held-out validation of one rank: what torchtitan asks for as `build_validator_fn`."""
    validation, training = job_config.validation, job_config.training
    rows_per_batch = training.local_batch_size if validation.local_batch_size < 0 else validation.local_batch_size
    if parallel_dims.pp_enabled and rows_per_batch != training.local_batch_size:
        logger.info(
            f"validation.local_batch_size = {rows_per_batch} follows training.local_batch_size = "
            f"{training.local_batch_size}, which the pipeline is built for; the held-out figure does not depend on it"
        )
        rows_per_batch = training.local_batch_size
    rows = HeldOutRows(
        split_source(job_config, "validation", training.seq_len if validation.seq_len < 0 else validation.seq_len),
        dp_rank=dp_rank,
        dp_size=dp_world_size,
        rows_per_batch=rows_per_batch,
        max_rows=None if validation.steps < 0 else validation.steps,
        context_slice=context_slice(job_config),
    )
    return BLTValidator(
        job_config,
        rows,
        parallel_dims=parallel_dims,
        metrics=metrics_processor,
        autocast=context["maybe_enable_amp"],
        loss_fn=context["loss_fn"],
        pp_schedule=context["pp_schedule"],
        has_first_stage=bool(context["pp_has_first_stage"]),
        has_last_stage=not parallel_dims.pp_enabled or bool(context["pp_has_last_stage"]),
    )
