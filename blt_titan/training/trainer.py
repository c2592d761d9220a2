"""The trainer: torchtitan's, with a step that counts bytes, asks the device for nothing, and stops on a bad loss."""

import json
import logging
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

# isort: split
import torchtitan.train
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from blt_titan.batch import IGNORE_LABEL, Batch
from blt_titan.checkpoint.description import Description
from blt_titan.checkpoint.steps import set_later_aside
from blt_titan.config.resume import RunStateError, changed_settings, recorded_settings
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.patcher import EntropyPatcher
from blt_titan.loss import ByteCrossEntropy, bits_per_byte, count_targets
from blt_titan.scoring.entropies import OnlineEntropies
from blt_titan.training.checkpointer import RunCheckpoints
from blt_titan.training.exports import HFExports
from blt_titan.training.metrics import COUNTS, BLTMetrics
from blt_titan.training.run_folder import RunLock, record_settings
from blt_titan.training.spec import RowsDifferError, row_ranks  # registers the models, too
from parallelisms.clipping import clip_grad_norm
from parallelisms.hash_tables import reduce_partial_gradients


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm became NaN or infinite."""


_LONGEST_EXPORT = timedelta(hours=12)


class _NotTrueHere(logging.Filter):
    """Drops warnings of torchtitan that do not hold for us, and would send users looking for a mistake."""

    texts = (
        # fully_shard is always applied.
        "Mixed precision training with TP or PP is only supported when FSDP/HSDP/CP is enabled",
        # The loss is summed over ranks, and rank 0 logs it.
        "Pipeline Parallel loss is not visible",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record may pass."""
        return not any(text in record.getMessage() for text in self.texts)


logger.addFilter(_NotTrueHere())
# Its Trainer makes one by this name, and offers no other way to hand it another.
torchtitan.train.CheckpointManager = RunCheckpoints


class BLTTrainer(Trainer):
    """Trains `blt` and `blt_entropy`. See torchtitan's Trainer for the attributes."""

    job_config: RunConfig
    metrics_processor: BLTMetrics
    loss_fn: ByteCrossEntropy
    dataloader: RowLoader  # pyright: ignore[reportIncompatibleVariableOverride]
    checkpointer: RunCheckpoints

    def __init__(self, job_config: RunConfig):
        self._run_lock: RunLock | None = None
        self._saved_settings: dict[str, Any] = {}
        if os.environ.get("RANK", "0") == "0":
            self._run_lock = RunLock(job_config.job.dump_folder)
            record_settings(job_config)
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
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        quarantines = job_config.data.on_damage == "quarantine"
        self._row_ranks = row_ranks(job_config) if quarantines else None
        self._first_step = 1
        self.checkpointer.on_loaded = self._begin_after_load
        self._exports: HFExports | None = None
        if job_config.export.hf_every:
            # All wait for the last export, which may take longer than a collective of training ever should.
            self._export_group: Any = dist.new_group(backend="gloo", timeout=_LONGEST_EXPORT)
            self._exports = self._hf_exports() if dist.get_rank() == 0 else None

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, counting their real bytes and the time spent waiting for them."""
        batches = iter(data_iterable)
        while True:
            began = time.perf_counter()
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
        self.optimizers.zero_grad()
        lr = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        # Targets and EOS targets of the global batch; the loss is divided by their number, whoever holds them.
        targets = torch.stack([count_targets(batch.labels_BS) for batch in batches]).sum(0)
        if self.device.type == "cuda":
            targets = targets.pin_memory()  # else the copy would wait for the device
        global_targets = self._sum_over_ranks(targets.to(self.device, non_blocking=True))

        self._targets_seen = self._targets_seen + global_targets[0]

        self.loss_fn.n_targets, self.loss_fn.eos_nats = global_targets[0], None
        undivided = torch.ones((), device=self.device)  # torchtitan divides after a pipeline's backward; ours is done
        losses = []
        for batch in batches:
            ids_BS, layout, labels_BS = batch.to(self.device)
            # torchtitan hands its dict on to `post_dataloading_process`, and looks at nothing in it.
            inputs: dict[str, Any] = {"ids": ids_BS, "layout": layout}
            loss = self.forward_backward_step(input_dict=inputs, labels=labels_BS, global_valid_tokens=undivided)
            losses.append(loss.detach())
        parameters = [p for part in self.model_parts for p in part.parameters()]
        reduce_partial_gradients(parameters)
        grad_norm = clip_grad_norm(
            parameters, self.job_config.training.max_norm, pp_mesh=self.parallel_dims.get_optional_mesh("pp")
        )
        loss = torch.stack(losses).sum() if self._counts else torch.zeros((), device=self.device)
        self._note_if_bad(loss, grad_norm)
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.lr_schedulers.step()

        # The last step too: what is wrong with it must not pass for a completed run.
        log_due = self.metrics_processor.should_log(self.step) or self.step == self.job_config.training.steps
        if log_due:
            self._log(loss, grad_norm, lr, global_targets)
        if log_due or self._save_due():
            self._stop_if_bad()
            self._stop_if_rows_differ()
        if self._exports is not None:
            if self.step == 1:
                self._exports.go_on_from(0, self._is_exported)  # nothing: what is there is another run's
            # The checkpoint of this step is written right after it, and exported once it is complete.
            if self._save_due() and self._is_exported(self.step):
                self._exports.add(self.step)
            self._exports.poll()
        if self.step == self._first_step != 1:  # after step 1 torchtitan does it
            seconds = self.job_config.comm.train_timeout_seconds
            dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)

    def train(self) -> None:
        """Train to the last step, then wait for exports.

        Raises:
            ExportFailedError: the run is complete, but a Hugging Face directory could not be written.
        """
        super().train()
        config = self.job_config
        if not config.export.hf_every:
            return
        try:
            if self._exports is not None:
                self._exports.finish()
        finally:
            dist.barrier(group=self._export_group)

    def close(self) -> None:
        """End what still runs beside the training."""
        if self._exports is not None:
            self._exports.stop()
        super().close()
        if self._run_lock is not None:
            self._run_lock.release()

    def _hf_exports(self) -> HFExports:
        config = self.job_config
        export = config.export
        folder = Path(config.job.dump_folder)
        return HFExports(
            folder / config.checkpoint.folder,
            folder / "hf",
            description=self._describe_model(),
            entropy_checkpoint=export.entropy_checkpoint or config.patching.entropy_checkpoint,
            dtype=export.dtype,
            force=export.force,
        )

    def _is_exported(self, step: int) -> bool:
        config = self.job_config
        if step == 0:  # a seed checkpoint
            return False
        checkpoints, beside = divmod(step, config.checkpoint.interval)
        return step == config.training.steps or (not beside and checkpoints % config.export.hf_every == 0)

    def _describe_model(self) -> Description:
        patcher = self.dataloader.source.patcher
        entropies = patcher.entropies.fingerprint if isinstance(patcher, EntropyPatcher) else ""
        return Description(self.job_config.model.name, self.model_args, patcher.rule, entropies)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint says beside weights, optimizer and data: the step, and what model it is.

        The rule of its patches too: whoever generates with it must cut as it was trained.
        """
        return super().state_dict() | {
            "model": self._describe_model().to_json(),
            "bytes_seen": int(self._targets_seen),
            "settings": json.dumps(recorded_settings(self.job_config)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's step.

        Raises:
            RunStateError: the checkpoint is of a model that computes something else with weights of the same shapes.
        """
        super().load_state_dict(state_dict)
        saved = Description.from_json(state_dict["model"], "the checkpoint")
        if found := saved.difference(self._describe_model()):
            raise RunStateError(f"the checkpoint {found}: set it as it was, or begin in another job.dump_folder")
        self._targets_seen.fill_(state_dict["bytes_seen"])
        self._saved_settings = json.loads(state_dict["settings"])

    def _begin_after_load(self) -> None:
        """Settle what the step that was loaded means for the run's folder; collective."""
        for sentence in changed_settings(self._saved_settings, self.job_config):
            logger.info(sentence)
        self.metrics_processor.resume_at(self.step)
        self._set_later_checkpoints_aside()
        self._first_step = self.step + 1
        if self.should_continue_training():
            self._set_learning_rate()
        if not self.step:
            return
        if self._exports is not None:
            self._exports.go_on_from(self.step, self._is_exported)
        if not self.should_continue_training():
            logger.info(
                f"This run is complete: its checkpoint is of step {self.step}. Set training.steps above "
                f"{self.job_config.training.steps} to go on, or another job.dump_folder to begin anew"
            )

    def _set_learning_rate(self) -> None:
        """Have the schedule of this run, and not that of the checkpoint, say the learning rate of the next step."""
        for scheduler in self.lr_schedulers.schedulers:
            groups = scheduler.optimizer.param_groups
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]
        if self.step:
            logger.info(f"The learning rate of step {self._first_step} is {groups[0]['lr']:g}")

    def _set_later_checkpoints_aside(self) -> None:
        """Make room for the steps that will be made again."""
        config = self.job_config
        if dist.get_rank() == 0 and not config.checkpoint.load_only:
            set_later_aside(Path(config.job.dump_folder) / config.checkpoint.folder, self.step)
        dist.barrier()

    def _log(self, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float, global_targets: torch.Tensor) -> None:
        eos_nats = self.loss_fn.eos_nats
        nats = torch.stack([loss, torch.zeros_like(loss) if eos_nats is None else eos_nats]).double()
        counts = self.metrics_processor.take_counts().to(self.device)
        # The one place where the host waits for the device.
        dataset_ids = torch.from_numpy(self.dataloader.ids_by_dataset()).to(self.device)
        summed = self._sum_over_ranks(torch.cat([nats, counts.double(), dataset_ids.double()])).tolist()
        n_targets, n_eos = global_targets.tolist()
        loss_nats, all_eos_nats, *rest = summed
        self.metrics_processor.log_step(
            self.step,
            loss_nats=loss_nats,
            bits_per_byte=bits_per_byte(loss_nats * n_targets - all_eos_nats, n_targets - n_eos),
            grad_norm=grad_norm.item(),
            lr=lr,
            counts=rest[: len(COUNTS)],
            bytes_seen=int(self._targets_seen),
            dataset_ids=rest[len(COUNTS) :],
        )

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._counts:
            tensor = torch.zeros_like(tensor)
        dist.all_reduce(tensor)
        return tensor

    def _note_if_bad(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        first = bad & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(first, self.step, self._first_bad_step)

    def _save_due(self) -> bool:
        return self.checkpointer.enable and (
            self.step == self.job_config.training.steps or self.step % self.job_config.checkpoint.interval == 0
        )

    def _stop_if_rows_differ(self) -> None:
        """Find a record batch that was passed over on some of the ranks that read the same rows, and not on others."""
        if self._row_ranks is not None and not self._row_ranks.agree(self.dataloader.position_crc32()):
            raise RowsDifferError(
                f"rank {dist.get_rank()}: at step {self.step} ranks that read the same rows are not at the same place "
                "of the data: one of them passed over a record batch that others could read (the logs of the ranks say "
                "which). Nothing was saved since; see that all nodes have the same files"
            )

    def _stop_if_bad(self) -> None:
        first_bad_step = int(self._first_bad_step)
        if first_bad_step >= 0:
            raise NonFiniteLossError(
                f"rank {dist.get_rank()}: the loss or the gradient norm of step {first_bad_step} is not finite. "
                "Nothing was saved since. Lower optimizer.lr, or look at the data of that step; if the last checkpoint "
                "is finite but useless already, begin from an earlier one with checkpoint.load_step"
            )
