"""Metrics of a run: to the console, to TensorBoard, and as one JSON object per line in `<dump_folder>/metrics.jsonl`.

Rates count real bytes that are targets, never slots: a run cannot look fast by padding. Figures are of the whole job
unless their name says otherwise; `loss_nats` and `bits_per_byte` are of the step they stand at, the rest of the steps
since the last line.
"""

import copy
import itertools
import json
import math
import os
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blt_titan.batch import Batch
from blt_titan.data.rows.mixture import dataset_names
from blt_titan.data.store.address import is_remote
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.data.store.fetch_counts import counted
from blt_titan.loss import count_targets
from blt_titan.monitor.monitor import RunMonitor
from blt_titan.monitor.watch import Line, RankFigures
from blt_titan.titan import MetricsProcessor, ParallelDims, get_peak_flops, logger
from blt_titan.training.data import dataset_paths
from blt_titan.training.tensorboard import Curves

COUNTS = ("byte_targets", "eos_targets", "bytes", "byte_slots", "patches", "patch_slots", "quarantined")
"""What is counted of each batch, in this order. `bytes` are all real positions, BOS and EOS too; `quarantined` are the
record batches that were passed over on the way to it."""

FETCHED = {"fetched_bytes": "fetched_bytes", "fetch_retries": "retries", "cache_evictions": "evictions"}
"""What a run is told of object stores, and the field of `FetchCounts` that counts it."""

_KNOWN_DEVICES = ("A100", "H100", "H200", "H20", "B200", "MI250", "MI300X", "MI325X", "MI355X")


def count_batch(batch: Batch, n_slices: int = 1, quarantined: int = 0) -> torch.Tensor:
    """Count a batch of one slice of each row on the host, before it moves to a device: int64 [len(COUNTS)]."""
    layout = batch.layout
    n_targets, n_eos = count_targets(batch.labels_BS)
    n_bytes = (layout.byte_doc_BS >= 0).sum()
    # Of the own slice; the patch fields are of the whole row.
    n_patches = (layout.byte_patch_BS.amax(1) + 1).sum()
    byte_slots, patch_slots = layout.byte_doc_BS.numel(), layout.patch_doc_BP.numel() // n_slices
    return torch.stack(
        [
            *(n_targets - n_eos, n_eos, n_bytes, torch.tensor(byte_slots), n_patches),
            *(torch.tensor(patch_slots), torch.tensor(quarantined)),
        ]
    )


class JsonLines:
    """A file of JSON objects, one per line; a resumed run replaces the lines after its checkpoint.

    A disk that is full, or a file that cannot be opened, is said once in the log: metrics are no reason to stop a run.
    """

    def __init__(self, path: Path):
        self.path = path
        self._keep_to_step = 0
        self._opened = False
        self._lost = 0

    def resume_at(self, step: int) -> None:
        """Keep the lines up to `step`; later ones belong to steps that will be made again."""
        self._keep_to_step, self._opened = step, False

    def write(self, line: dict[str, Any]) -> None:
        """Append one object; floats keep their full precision."""
        try:
            if not self._opened:
                self._open()
            written = json.dumps(line) + "\n"
            if self._lost and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                written = "\n" + written  # a full disk took half a line
            with self.path.open("a") as file:
                file.write(written)
        except OSError as error:
            if not self._lost:
                logger.warning(f"{self.path}: metrics cannot be written ({error.strerror}); the run goes on without")
            self._lost += 1
            return
        if self._lost:
            logger.warning(f"{self.path}: {self._lost} lines of metrics could not be written before this one")
            self._lost = 0

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._opened = True
            return
        written = self.path.read_bytes()
        # What follows the last newline was torn by a crash; a machine that stopped may have left zeros, too.
        steps = [(line, _step_of(line)) for line in written.split(b"\n")[:-1]]
        kept = b"".join(line + b"\n" for line, step in steps if step is not None and step <= self._keep_to_step)
        if kept != written:
            # A new run over an old one, or steps that a crash took back: the old lines stay beside the new file.
            name = f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
            names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            aside = next(path for path in map(self.path.with_name, names) if not path.exists())
            damaged = sum(step is None for _, step in steps) + bool(written and not written.endswith(b"\n"))
            if damaged:
                logger.warning(f"{self.path}: {damaged} lines are damaged and were left out; the file is now {aside}")
            os.replace(self.path, aside)
            write_atomically(self.path, kept)
        self._opened = True


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of metrics; None if it is none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if type(step) is int else None


class BLTMetrics(MetricsProcessor):
    """torchtitan's metrics processor with our figures; every rank has one, one of them writes."""

    def __init__(self, job_config: Any, parallel_dims: ParallelDims, model_args: Any):
        # torchtitan would begin another folder at each start, named by the minute.
        without = copy.copy(job_config)
        without.metrics = replace(job_config.metrics, enable_tensorboard=False)
        super().__init__(without, parallel_dims)
        self.job_config = job_config
        self._curves, self._curves_failed = _curves(job_config), False
        self.monitor: RunMonitor | None = None
        """Looks at the lines; on rank 0, once the ranks have met."""
        self.model_args = model_args
        self.world_size = parallel_dims.world_size
        self.n_slices = parallel_dims.cp * parallel_dims.tp
        self._reads_store = any(map(is_remote, dataset_paths(job_config.data, job_config.training)))
        self._fetched = torch.zeros(len(FETCHED), dtype=torch.int64)
        self.counts = torch.zeros(len(COUNTS), dtype=torch.int64)
        is_writer = torch.distributed.get_rank() == 0
        self.json_lines = JsonLines(Path(job_config.job.dump_folder) / "metrics.jsonl") if is_writer else None
        device_name = self.device_memory_monitor.device_name
        self._datasets = dataset_names(list(job_config.data.mixture))
        self._counts_quarantined = job_config.data.on_damage == "quarantine"
        self.online_seconds: Callable[[], float] | None = None
        """Seconds spent on scoring text so far, where the run does so."""
        self._online_seconds_before = 0.0
        self.peak_flops = get_peak_flops(device_name) if _is_known(device_name) else None

    def resume_at(self, step: int) -> None:
        """Continue after `step`, which a checkpoint holds."""
        if self.json_lines is not None:
            self.json_lines.resume_at(step)
        if self._curves is not None:
            self._curves.resume_at(step)

    def rank_figures(self, forward_s: float) -> RankFigures:
        """Return what this rank measured since the last line; `forward_s` is that of the step just made."""
        return RankFigures(forward_s, sum(self.data_loading_times), _tensors_gib())

    def count(self, batch: Batch, waited_s: float, *, quarantined: int = 0) -> None:
        """Count a batch that arrived, the time that training waited for it, and what was passed over before it."""
        self.counts += count_batch(batch, self.n_slices, quarantined)
        self.data_loading_times.append(waited_s)

    def take_counts(self) -> torch.Tensor:
        """Return this rank's counts since the last call, int64 [len(COUNTS)], and begin anew."""
        counts, self.counts = self.counts, torch.zeros_like(self.counts)
        return counts

    def take_fetched(self) -> torch.Tensor:
        """Return what this rank and its workers fetched since the last call, int64 [len(FETCHED)].

        Empty where no data set is in an object store. The first call tells of all since the process began: manifests
        and indices are fetched before there is a step.
        """
        if not self._reads_store:
            return torch.zeros(0, dtype=torch.int64)
        now = counted()
        before, self._fetched = self._fetched, torch.tensor([getattr(now, field) for field in FETCHED.values()])
        return self._fetched - before

    def log_step(
        self,
        step: int,
        *,
        loss_nats: float,
        bits_per_byte: float,
        grad_norm: float,
        lr: float,
        counts: list[float],
        bytes_seen: int,
        failures: Mapping[str, float] = types.MappingProxyType({}),
        dataset_ids: Sequence[float] = (),
        fetched: Sequence[float] = (),
        ranks: Sequence[RankFigures] = (),
        saving: tuple[int, float] = (0, 0.0),
    ) -> None:
        """Write the figures of a step and of the steps since the last line.

        Args:
            step: the step just made.
            loss_nats: nats per target of the global batch.
            bits_per_byte: of the global batch, EOS left out.
            grad_norm: before clipping.
            lr: learning rate of the step.
            counts: COUNTS since the last line, summed over ranks.
            bytes_seen: targets since the run began, EOS included, summed over ranks.
            failures: what was skipped, and other counts of what went wrong, by name.
            dataset_ids: ids of each data set of the mixture since the run began, summed over ranks.
            fetched: FETCHED since the last line, summed over ranks; empty of a run that reads from no object store.
            ranks: what each rank measured since the last line.
            saving: checkpoints that were begun since the last line, and seconds that training has waited for saves.
        """
        now = time.perf_counter()
        seconds = now - self.time_last_log
        count = dict(zip(COUNTS, counts, strict=True))
        mean_patch_bytes = count["bytes"] / count["patches"] if count["patches"] else math.nan
        per_device = count["byte_targets"] / seconds / self.world_size
        metrics = {
            "loss_nats": loss_nats,
            "bits_per_byte": bits_per_byte,
            "bytes_per_second": count["byte_targets"] / seconds,
            "bytes_per_second_per_device": per_device,
            "patches_per_second": count["patches"] / seconds,
            "mean_patch_bytes": mean_patch_bytes,
            "padded_byte_share": 1 - count["bytes"] / count["byte_slots"],
            "padded_patch_share": 1 - count["patches"] / count["patch_slots"],
            "grad_norm": grad_norm,
            "lr": lr,
            "data_wait_share": sum(self.data_loading_times) / seconds,
            "bytes_seen": bytes_seen,
            **failures,
        }
        flops = 3 * self.model_args.forward_flops_per_byte(self.job_config.training.seq_len, mean_patch_bytes)
        # Of all bytes, as if patches had always been as long as since the last line.
        metrics["training_flops"] = flops * metrics["bytes_seen"]
        for name, ids in zip(self._datasets, dataset_ids, strict=True):
            metrics[f"share/{name}"] = ids / sum(dataset_ids)
        if fetched:
            metrics |= dict(zip(FETCHED, map(int, fetched), strict=True))
        if self._counts_quarantined:
            metrics["quarantined_record_batches"] = count["quarantined"]
        if self.online_seconds is not None:
            spent = self.online_seconds()
            metrics["online_entropy_share"] = (spent - self._online_seconds_before) / seconds
            self._online_seconds_before = spent
        if self.peak_flops is not None:
            metrics["mfu"] = flops * per_device / self.peak_flops
        if (memory_gib := self.device_memory_monitor.get_peak_stats().max_reserved_gib) > 0:
            metrics["memory_gib"] = memory_gib
        if self.monitor is not None:
            line = Line(step, seconds, saving[1], saving[0], count["byte_targets"], grad_norm, ranks)
            metrics |= self.monitor.look(line)
        self._write(step, metrics)
        logger.info(
            f"step {step:>6}  loss {loss_nats:.5f} nats  {bits_per_byte:.4f} bits/byte  "
            f"grad norm {grad_norm:.4f}  lr {lr:.2e}  {metrics['bytes_per_second']:,.0f} bytes/s  "
            f"patch {mean_patch_bytes:.2f} bytes  waited {metrics['data_wait_share']:.1%}"
            + (f"  mfu {metrics['mfu']:.1%}" if "mfu" in metrics else "")
        )
        self.restart_clock()

    def log_held_out(self, step: int, *, bits_per_byte: float, loss_nats: float, seconds: float) -> None:
        """Write the figures of a validation pass; its time does not count as training."""
        metrics = {
            "heldout_bits_per_byte": bits_per_byte,
            "heldout_loss_nats": loss_nats,
            "heldout_seconds": seconds,
        }
        self._write(step, metrics)
        logger.info(f"step {step:>6}  held-out {bits_per_byte:.4f} bits/byte  {loss_nats:.5f} nats  ({seconds:.1f} s)")
        self.time_last_log += seconds

    def restart_clock(self) -> None:
        """Begin the next interval now."""
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def close(self) -> None:
        """Close what is written to."""
        if self.monitor is not None:
            self.monitor.close()
        try:
            super().close()
            if self._curves is not None:
                self._curves.close()
        except OSError as error:  # of what could not be written before
            logger.warning(f"TensorBoard's file is not whole ({error.strerror})")

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        try:
            self.logger.log(metrics, step)
            if self._curves is not None:
                self._curves.log(metrics, step)
        except OSError as error:
            if not self._curves_failed:
                logger.warning(f"TensorBoard's files cannot be written ({error}); the run goes on without")
            self._curves_failed = True
        if self.json_lines is not None:
            # JSON has no NaN; a figure that does not exist is null.
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            self.json_lines.write({"step": step, **finite})
        if self.monitor is not None:
            self.monitor.publish(step, metrics)


def _curves(job_config: Any) -> Curves | None:
    """Return what writes TensorBoard's files of this rank, if it shall."""
    rank, settings = torch.distributed.get_rank(), job_config.metrics
    if not settings.enable_tensorboard or (rank != 0 and not settings.save_for_all_ranks):
        return None
    folder = Path(job_config.job.dump_folder) / settings.save_tb_folder
    return Curves(folder / f"rank_{rank}" if settings.save_for_all_ranks else folder)


def _tensors_gib() -> float:
    """Return GiB of tensors at the peak since the last line: what a dry run predicts, not what the allocator holds."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def _is_known(device_name: str) -> bool:
    return any(known in device_name for known in _KNOWN_DEVICES)
