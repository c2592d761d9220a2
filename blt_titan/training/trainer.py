"""The trainer: torchtitan's, whose step counts bytes, waits for the device only to log, and stops on a bad loss."""

import itertools
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import blt_titan.training.spec  # noqa: F401 (registers the models)
from blt_titan.batch import IGNORE_LABEL, Batch, to_device
from blt_titan.checkpoint.description import Description
from blt_titan.checkpoint.steps import set_later_aside
from blt_titan.config.resume import changed_settings, record_load_step, recorded_settings
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.copies import copied_ahead
from blt_titan.data.rows.documents import few_documents
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.patcher import EntropyPatcher
from blt_titan.loss import ByteCrossEntropy, StepSums, bits_per_byte, count_along
from blt_titan.monitor.record import RunRecord
from blt_titan.scoring.online import OnlineEntropies
from blt_titan.titan import (
    DataloaderExhaustedError,
    ParallelDims,
    Trainer,
    logger,
    set_pg_timeouts,
    use_checkpoint_manager,
)
from blt_titan.training.block_times import BlockTimes
from blt_titan.training.checkpointer import RunCheckpoints
from blt_titan.training.failures import StepWatch, apply_update
from blt_titan.training.gradients import divide_gradients
from blt_titan.training.heartbeat import Heartbeat
from blt_titan.training.loader import most_documents
from blt_titan.training.log_lines import drop_misleading_lines
from blt_titan.training.metrics import COUNTS, BLTMetrics
from blt_titan.training.preemption import PreemptedError, Preemption
from blt_titan.training.resumption import check_same_model, describe_model, go_back_once, set_learning_rate
from blt_titan.training.rollbacks import Rollbacks
from blt_titan.training.row_ranks import row_ranks
from blt_titan.training.run_folder import RunLock, record_settings
from blt_titan.training.same_everywhere import check_same_data, check_same_settings
from blt_titan.training.scheduled_exports import ScheduledExports
from blt_titan.training.watching import begin_record, figures_of_ranks, make_monitor
from parallelisms.clipping import clip_grad_norm
from parallelisms.hash_tables import reduce_partial_gradients

use_checkpoint_manager(RunCheckpoints)


class BLTTrainer(Trainer):
    """Trains `blt` and `blt_entropy`. See torchtitan's Trainer for the attributes.

    Args:
        job_config: the run's settings.
        record: of how the run goes and ends, where somebody else writes its end if this raises.
    """

    job_config: RunConfig
    metrics_processor: BLTMetrics
    loss_fn: ByteCrossEntropy
    dataloader: RowLoader  # pyright: ignore[reportIncompatibleVariableOverride]
    checkpointer: RunCheckpoints

    def __init__(self, job_config: RunConfig, record: RunRecord | None = None):
        drop_misleading_lines()
        self.record = record or RunRecord()
        self._checkpoints = Path(job_config.job.dump_folder) / job_config.checkpoint.folder
        self._run_lock: RunLock | None = None
        self._saved_settings: dict[str, Any] = {}
        if os.environ.get("RANK", "0") == "0":
            self._run_lock = RunLock(job_config.job.dump_folder)
            record_settings(job_config)
            begin_record(self.record, job_config)
        with warnings.catch_warnings():
            # torchtitan makes an autocast to fp32 on the CPU, which torch turns off with a warning; see below.
            warnings.filterwarnings("ignore", message="In CPU autocast")
            super().__init__(job_config)
        if job_config.training.mixed_precision_param == "float32" or self.parallel_dims.world_size > 1:
            # With more than one rank fully_shard casts; torchtitan would enter an autocast on top.
            self.maybe_enable_amp = nullcontext()
            if job_config.validation.enable:
                self.validator.autocast = self.maybe_enable_amp  # pyright: ignore[reportAttributeAccessIssue]
        # Pipeline ranks have the same batch; the last stage's count it, and the loss is theirs.
        self._counts = not self.parallel_dims.pp_enabled or self.pp_has_last_stage
        patcher = self.dataloader.source.patcher
        if isinstance(patcher, EntropyPatcher) and isinstance(online := patcher.entropies, OnlineEntropies):
            self.metrics_processor.online_seconds = lambda: online.seconds
        self._targets_seen = torch.zeros((), dtype=torch.int64, device=self.device)
        self.watch = StepWatch.of_run(job_config, self.device.type)
        """Looks at each step's loss and gradient norm."""
        self.heartbeat = Heartbeat()
        """Where the training is; the entry point has it watched."""
        self._rollbacks = Rollbacks(
            job_config.failure.rollback_steps,
            checkpoints=self._checkpoints,
            checkpointer=self.checkpointer,
            dataloader=self.dataloader,
            watch=self.watch,
            heartbeat=self.heartbeat,
        )
        quarantines = job_config.data.on_damage == "quarantine"
        check_same_data(self.dataloader.identity())
        self._row_ranks = row_ranks(job_config.parallelism) if quarantines else None
        self._most_documents = most_documents(job_config)
        self.preemption = Preemption()
        """Asked after each step whether to leave; it hears of nothing until the entry point has it listen."""
        if job_config.validation.enable:
            self.validator.heartbeat = self.heartbeat  # pyright: ignore[reportAttributeAccessIssue]
        self._first_step = 1
        self.checkpointer.on_loaded = self._begin_after_load
        self._block_times = BlockTimes(self.model_parts, self.device)
        self.metrics_processor.monitor = make_monitor(job_config, self.parallel_dims, self.record)
        self._exports: ScheduledExports | None = None
        if job_config.export.hf_every:
            self._exports = ScheduledExports.of_run(job_config, self._describe_model())

    def init_distributed(self) -> ParallelDims:
        """Have ranks find each other, and compare what they are to do.

        Raises:
            RunConfigError: they were given different settings.
        """
        dims = super().init_distributed()
        if dist.get_rank() != 0:
            # Rank 0 has the folder by now, so it is no other run's.
            begin_record(self.record, self.job_config)
        check_same_settings(self.job_config)
        return dims

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, counting their real bytes and the time spent waiting for them."""
        batches = iter(few_documents(data_iterable, self._most_documents))
        while True:
            began = time.perf_counter()
            self.heartbeat.at("data", self.step)
            try:
                batch = next(batches)
            except StopIteration as ended:
                raise DataloaderExhaustedError from ended
            waited_s = time.perf_counter() - began
            self.metrics_processor.count(batch, waited_s, quarantined=self.dataloader.take_quarantined())
            self.ntokens_seen += int((batch.labels_BS != IGNORE_LABEL).sum())
            yield batch

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """Pass the layout as a keyword argument: those reach every pipeline stage, extra inputs only the first."""
        return input_dict["ids"], labels, {}, {"layout": input_dict["layout"]}

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Make one step: accumulate, clip, update, and log where it is due."""
        # The last step too: what is wrong with it must not pass for a completed run.
        log_due = self.metrics_processor.should_log(self.step) or self.step == self.job_config.training.steps
        self._block_times.on = log_due
        self.optimizers.zero_grad()
        lr = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
        first_row = self.dataloader.rows_served
        targets = torch.zeros(2, dtype=torch.int64)  # and those that are EOS: this rank's, counted as batches come
        batches = count_along(itertools.islice(data_iterator, self.gradient_accumulation_steps), targets)

        undivided = torch.ones((), device=self.device)
        losses = []
        with self.loss_fn.step(1.0) as sums:
            for batch in copied_ahead(batches, self.device):
                ids_BS, layout, labels_BS = batch
                # torchtitan hands its dict on to `post_dataloading_process`, and looks at nothing in it.
                inputs: dict[str, Any] = {"ids": ids_BS, "layout": layout}
                self.heartbeat.at("forward/backward")
                loss = self.forward_backward_step(input_dict=inputs, labels=labels_BS, global_valid_tokens=undivided)
                losses.append(loss.detach())
        # Of the global batch, whoever holds them; what the loss is divided by, once, so that a step can begin before
        # its last micro-batch is there to be counted.
        self.heartbeat.at("reduce")
        # A save that failed is a reason to leave too: `_leave` says it, on all ranks.
        told = torch.tensor([int(self.preemption.told or self.checkpointer.has_failed())])
        if not self._counts:
            targets = torch.zeros_like(targets)
        nats = torch.stack(losses).sum() if self._counts else torch.zeros((), device=self.device)
        counted = to_device(torch.cat([targets, told]), self.device)
        summed = torch.cat([counted.double(), nats.double().view(1)])  # whole numbers below 2**53 are exact
        dist.all_reduce(summed)
        global_targets = summed[:2].long()
        self.preemption.note(summed[2])
        parameters = [p for part in self.model_parts for p in part.parameters()]
        reduce_partial_gradients(parameters)
        divide_gradients(parameters, global_targets[0])
        grad_norm = clip_grad_norm(
            parameters, self.job_config.training.max_norm, pp_mesh=self.parallel_dims.get_optional_mesh("pp")
        )
        global_loss = summed[3] / summed[0]
        rows = range(first_row, self.dataloader.rows_served)
        self.watch.note(self.step, global_loss, grad_norm.to(self.device), rows)
        self.heartbeat.at("optimizer")
        self.checkpointer.maybe_wait_for_staging()
        self._update(global_loss, grad_norm, global_targets[0])

        self._block_times.on = False
        self.record.made(self.step)
        self.heartbeat.at("log")
        if log_due or self._save_due():
            self.watch.look_at_all()
        else:
            self.watch.look()
        if log_due:
            self._log(nats / global_targets[0], sums, grad_norm, lr, global_targets)
        self.watch.check()
        if self.watch.spike is not None:
            self._rollbacks.prepare(self.watch.spike)
        if (log_due or self._save_due()) and self._row_ranks is not None:
            self._row_ranks.check_position(self.dataloader.position_crc32(), self.step)
        if self._exports is not None:
            if self.step == 1:
                self._exports.resume_at(0)
            # The checkpoint of this step is written right after it.
            self._exports.after_step(self.step, saves=self._save_due())
        if self.step == self._first_step != 1:  # after step 1 torchtitan does it
            seconds = self.job_config.comm.train_timeout_seconds
            set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)
        if self._save_due():
            self.heartbeat.at("save")

    def _update(self, loss: torch.Tensor, grad_norm: torch.Tensor, n_targets: torch.Tensor) -> None:
        """Update the weights; a step that is skipped leaves all but the schedule as it was, without a word to the host.

        The schedule is a function of the step, which only the device knows to be skipped.
        """
        if self.watch.skips:
            wrong = ~(loss.isfinite() & grad_norm.isfinite())
            apply_update(self.optimizers, wrong)
            n_targets = torch.where(wrong, 0, n_targets)
        else:
            self.optimizers.step()
        self._targets_seen = self._targets_seen + n_targets
        self.lr_schedulers.step()

    def should_continue_training(self) -> bool:
        """Tell whether there is a step to make; goes back first, where the loss has spiked.

        Raises:
            PreemptedError: the run was told to leave; what was made is saved.
        """
        if self._rollbacks.is_due:
            self._rollbacks.go_back()
            return True
        if not super().should_continue_training():
            return False
        # Asked for the first time before there is a step.
        self.heartbeat.warm = self.heartbeat.warm or self.step >= self._first_step
        if self.preemption.is_due(self.device.type):
            self._leave()
        return True

    def _leave(self) -> None:
        """Save, unless this step is saved already, and end the run."""
        told = f"told to leave by {self.preemption.name}"
        if not self.checkpointer.enable or self.job_config.checkpoint.load_only:
            raise PreemptedError(f"{told} after step {self.step}; nothing is saved, as checkpoint says")
        began = time.perf_counter()
        self.watch.look_at_all()
        self.watch.check()
        if self.watch.spike is not None:
            self._rollbacks.prepare(self.watch.spike)
        self.heartbeat.at("save")
        if self._rollbacks.is_due:
            self._rollbacks.go_back()
        else:
            self.checkpointer.save_now(self.step)
        raise PreemptedError(
            f"{told}: step {self.step} is saved, in {time.perf_counter() - began:.1f} s; the same command goes on"
        )

    def train(self) -> None:
        """Train to the last step, then wait for exports.

        `checkpoint.load_step` is honoured once.

        Raises:
            ExportFailedError: the run is complete, but a Hugging Face directory could not be written.
            PreemptedError: the run was told to leave; what was made is saved.
        """
        go_back_once(self.job_config)
        self.heartbeat.at("load")
        super().train()
        if self._exports is not None:
            self.heartbeat.at("exports")
            self._exports.finish(self.preemption)
        self.heartbeat.at("end")
        if dist.get_rank() == 0:
            steps = self.job_config.training.steps
            ran_out = f"; its data ended before step {steps}" if self.step < steps else ""
            self.record.end("done", 0, f"the run is complete{ran_out}")

    def close(self) -> None:
        """End what still runs beside the training."""
        if self._exports is not None:
            self._exports.stop()
        super().close()
        if self._run_lock is not None:
            self._run_lock.release()

    def _describe_model(self) -> Description:
        return describe_model(self.job_config.model.name, self.model_args, self.dataloader.source.patcher)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint says beside weights, optimizer and data: the step, and what model it is."""
        return super().state_dict() | {
            "model": self._describe_model().to_json(),
            "bytes_seen": int(self._targets_seen),
            "settings": json.dumps(recorded_settings(self.job_config)),
            "failure": self.watch.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's step.

        Raises:
            RunStateError: the checkpoint is of a model that computes something else with weights of the same shapes.
        """
        super().load_state_dict(state_dict)
        check_same_model(state_dict["model"], self._describe_model())
        self._targets_seen.fill_(state_dict["bytes_seen"])
        self._saved_settings = json.loads(state_dict["settings"])
        self.watch.load(state_dict["failure"])

    def _begin_after_load(self) -> None:
        """Settle what the step that was loaded means for the run's folder; collective."""
        for sentence in changed_settings(self._saved_settings, self.job_config):
            logger.info(sentence)
        self.metrics_processor.resume_at(self.step)
        self.record.loaded(self.step)
        self.watch.resume_at(self.step)
        if dist.get_rank() == 0 and not self.job_config.checkpoint.load_only:
            set_later_aside(self._checkpoints, self.step)  # room for the steps that will be made again
            record_load_step(self.job_config)
        dist.barrier()
        self._rollbacks.go_on(self.step)
        self._first_step = self.step + 1
        goes_on = self.step < self.job_config.training.steps
        if goes_on:
            set_learning_rate(self.lr_schedulers, self._first_step if self.step else None)
        if not self.step:
            return
        if self._exports is not None:
            self._exports.resume_at(self.step)
        if not goes_on:
            logger.info(
                f"This run is complete: its checkpoint is of step {self.step}. Set training.steps above "
                f"{self.job_config.training.steps} to go on, or another job.dump_folder to begin anew"
            )

    def _log(
        self, loss: torch.Tensor, sums: StepSums, grad_norm: torch.Tensor, lr: float, global_targets: torch.Tensor
    ) -> None:
        nats = torch.stack([loss, torch.zeros_like(loss) if sums.eos_nats is None else sums.eos_nats]).double()
        counts = to_device(self.metrics_processor.take_counts(), self.device)
        dataset_ids = to_device(torch.from_numpy(self.dataloader.ids_by_dataset()), self.device)
        counted = torch.cat([nats, counts.double(), dataset_ids.double()])
        # The one place where the host waits for the device.
        summed = self._sum_over_ranks(counted, to_device(self.metrics_processor.take_fetched(), self.device)).tolist()
        n_targets, n_eos = global_targets.tolist()
        loss_nats, all_eos_nats, *rest = summed[: len(counted)]
        self.metrics_processor.log_step(
            self.step,
            loss_nats=loss_nats,
            bits_per_byte=bits_per_byte(loss_nats * n_targets - all_eos_nats, n_targets - n_eos),
            grad_norm=grad_norm.item(),
            lr=lr,
            counts=rest[: len(COUNTS)],
            bytes_seen=int(self._targets_seen),
            failures=self.watch.metrics(),
            dataset_ids=rest[len(COUNTS) :],
            fetched=summed[len(counted) :],
            ranks=figures_of_ranks(self.metrics_processor.rank_figures(self._block_times.take()), self.device),
            saving=self.checkpointer.take_saving(),
        )

    def _sum_over_ranks(self, counted: torch.Tensor, fetched: torch.Tensor) -> torch.Tensor:
        # Every rank fetches for itself.
        tensor = torch.cat([counted if self._counts else torch.zeros_like(counted), fetched.double()])
        dist.all_reduce(tensor)
        return tensor

    def _save_due(self) -> bool:
        checkpoint = self.job_config.checkpoint
        return self.checkpointer.enable and (
            self.step == self.job_config.training.steps
            or self.step % checkpoint.interval == 0
            or (self.step == 1 and checkpoint.enable_first_step_checkpoint)
        )
