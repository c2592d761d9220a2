"""What a run does about steps that went wrong: a loss or a gradient norm that is not finite, a spike of the loss.

In: of each step two numbers on the device, the loss of the global batch and the norm of its gradients, both the same on
all ranks, and the step's rows. Out: steps that are skipped, a spike to go back before, or the end of the run; on all
ranks after the same step.

The decision that is not obvious: nothing waits for the numbers (`late_reads.py`). The device itself leaves weights as
they were where a step is skipped (`apply_update`); the host hears of it steps later, and at the latest before anything
is logged or saved.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blt_titan.checkpoint.steps import complete_steps
from blt_titan.config.run_config import RunConfig
from blt_titan.job_config import Failure
from blt_titan.titan import logger
from blt_titan.training.late_reads import LateReads
from blt_titan.training.metrics import JsonLines
from blt_titan.training.spikes import LossSpikes


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm became NaN or infinite, once or too often."""


class LossSpikeError(RuntimeError):
    """The loss spiked once more than the run goes back for."""


@dataclass(frozen=True)
class StepFigures:
    """What the host hears of a step."""

    step: int
    loss_nats: float
    grad_norm: float
    rows: range
    """Numbers in the sequence of rows of the run, over all ranks."""

    def to_json(self) -> dict[str, Any]:
        """Return the step as a line of `skipped.jsonl`; JSON has no NaN, so what is not finite is text."""
        loss, norm = (x if math.isfinite(x) else str(x) for x in (self.loss_nats, self.grad_norm))
        return {
            **{"step": self.step, "why": "not finite", "loss_nats": loss, "grad_norm": norm},
            **{"first_row": self.rows.start, "last_row": self.rows[-1]},
        }


class StepWatch:
    """Looks at the loss and the gradient norm of each step; one on each rank, all of which see the same.

    Args:
        settings: what is done about what is seen.
        device_type: of the numbers.
        log: gets a line for each step that was skipped; on one rank.
        checkpoints: the folder of the run's `step-N`; None if it saves none.
    """

    def __init__(self, settings: Failure, *, device_type: str, log: JsonLines | None, checkpoints: Path | None):
        self._settings, self._device_type, self._log, self._checkpoints = settings, device_type, log, checkpoints
        self._noted: LateReads[tuple[int, range]] = LateReads()
        self._stop: str | None = None
        self._recent: list[int] = []
        self._spikes: LossSpikes | None = None
        if settings.on_spike != "off":
            self._spikes = LossSpikes(sigmas=settings.spike_sigmas, window=settings.spike_window)
        self.skipped_steps = 0
        self.loss_spikes = 0
        self.rollbacks = 0
        self.spike: StepFigures | None = None
        """A spike that the run is to go back before."""

    @classmethod
    def of_run(cls, config: RunConfig, device_type: str) -> "StepWatch":
        """Make the watch of a rank that a run's settings ask for."""
        folder = Path(config.job.dump_folder)
        log = JsonLines(folder / "skipped.jsonl") if dist.get_rank() == 0 else None
        checkpoints = folder / config.checkpoint.folder if config.checkpoint.enable else None
        return cls(config.failure, device_type=device_type, log=log, checkpoints=checkpoints)

    @property
    def skips(self) -> bool:
        """Whether steps that are not finite change nothing."""
        return self._settings.on_nonfinite == "skip"

    def note(self, step: int, loss_nats: torch.Tensor, grad_norm: torch.Tensor, rows: range) -> None:
        """Keep the figures of the step just made, scalars on the device that are the same on all ranks."""
        self._noted.put((step, rows), torch.stack([loss_nats.double(), grad_norm.double()]))

    def look(self) -> None:
        """Judge the steps that the device has done; to be called after each step."""
        for (step, rows), figures in self._noted.take(self._device_type):
            self._judge(step, rows, figures)

    def look_at_all(self) -> None:
        """Judge all steps that were made; waits for the device."""
        for (step, rows), figures in self._noted.take_all():
            self._judge(step, rows, figures)

    def check(self) -> None:
        """Stop the run, if a step that was judged says so.

        Raises:
            NonFiniteLossError: naming the step.
        """
        if self._stop is not None:
            raise NonFiniteLossError(self._stop)

    def _judge(self, step: int, rows: range, on_host: torch.Tensor) -> None:
        if self._stop is not None:
            return
        loss_nats, grad_norm = on_host.tolist()
        figures = StepFigures(step, loss_nats, grad_norm, rows)
        if not (math.isfinite(figures.loss_nats) and math.isfinite(figures.grad_norm)):
            self._skip(figures) if self.skips else self._end(figures)
        elif self._spikes is not None:
            goes_on = self._spikes.in_spike
            bound = self._spikes.look(figures.loss_nats)
            if bound is not None and not goes_on:
                self._begin_spike(figures, bound)

    def _end(self, figures: StepFigures) -> None:
        self._stop = (
            f"rank {dist.get_rank()}: the loss or the gradient norm of step {figures.step} is not finite "
            f"({figures.loss_nats:g} and {figures.grad_norm:g}, rows {_shown(figures.rows)}). Nothing was saved since; "
            f"{self._saved_before()}. Lower optimizer.lr, look at the data of that step, or pass over such steps with "
            "failure.on_nonfinite = 'skip'; if what was saved last is of no use already, begin from an earlier step "
            "with checkpoint.load_step"
        )

    def _skip(self, figures: StepFigures) -> None:
        most, window = self._settings.max_skipped, self._settings.skip_window
        self.skipped_steps += 1
        self._recent = [step for step in self._recent if step > figures.step - window] + [figures.step]
        if self._log is not None:
            self._log.write(figures.to_json())
            logger.warning(
                f"step {figures.step} is skipped: its loss is {figures.loss_nats:g}, its gradient norm "
                f"{figures.grad_norm:g}; rows {_shown(figures.rows)} change nothing ({len(self._recent)} of the last "
                f"{window} steps, of which {most} may be)"
            )
        if len(self._recent) > most:
            self._stop = (
                f"rank {dist.get_rank()}: the loss or the gradient norm of step {figures.step} is not finite, and it "
                f"is number {len(self._recent)} of the last {window} steps that was skipped; failure.max_skipped = "
                f"{most} may be. Nothing was saved since; {self._saved_before()}. Lower optimizer.lr, look at the rows "
                "named in skipped.jsonl, or begin from an earlier step with checkpoint.load_step"
            )

    def _begin_spike(self, figures: StepFigures, bound: float) -> None:
        self.loss_spikes += 1
        if self._log is not None:
            logger.warning(
                f"the loss of step {figures.step} is a spike: {figures.loss_nats:.5f} nats, above {bound:.5f} "
                f"(failure.spike_sigmas = {self._settings.spike_sigmas:g}); rows {_shown(figures.rows)}"
            )
        if self._settings.on_spike == "rollback" and self.spike is None:
            self.spike = figures

    def _saved_before(self) -> str:
        steps = complete_steps(self._checkpoints) if self._checkpoints is not None else {}
        return f"step-{max(steps)} was saved before" if steps else "nothing was saved before"

    def go_back(self, spike: StepFigures, step: int, rows: range) -> None:
        """Count a rollback, and note it.

        Args:
            spike: what the run goes back before.
            step: to which it goes back; a run that resumes there, or later, keeps the line.
            rows: those that are not read again, the spike's among them.

        Raises:
            LossSpikeError: the run has gone back as often as it may.
        """
        most = self._settings.max_rollbacks
        if self.rollbacks >= most:
            raise LossSpikeError(
                f"rank {dist.get_rank()}: the loss of step {spike.step} is a spike ({spike.loss_nats:.5f} nats, rows "
                f"{_shown(spike.rows)}), and the run has gone back {self.rollbacks} times; failure.max_rollbacks = "
                f"{most} may be. {self._saved_before()}. Lower optimizer.lr, look at the rows named in skipped.jsonl, "
                "or allow more: the same command goes on"
            )
        self.rollbacks += 1
        if self._log is not None:
            line = {"step": step, "why": "spike", "spike_step": spike.step}
            self._log.write({**spike.to_json(), **line, "first_row": rows.start, "last_row": rows[-1]})
            logger.warning(
                f"goes back from the spike of step {spike.step} to step {step}, and on with row {rows.stop}: rows "
                f"{_shown(rows)} are not read again (rollback {self.rollbacks} of {most})"
            )

    def resume_at(self, step: int) -> None:
        """Keep the lines about steps up to `step`; later ones will be made again."""
        if self._log is not None:
            self._log.resume_at(step)

    def metrics(self) -> dict[str, float]:
        """Return what is counted, for a line of metrics."""
        counts: dict[str, float] = {"skipped_steps": self.skipped_steps} if self.skips else {}
        if self._spikes is not None:
            counts["loss_spikes"] = self.loss_spikes
        if self._settings.on_spike == "rollback":
            counts["rollbacks"] = self.rollbacks
        return counts

    def state(self) -> str:
        """Return what a checkpoint keeps, as JSON."""
        return json.dumps(
            {
                **{"skipped_steps": self.skipped_steps, "recent": self._recent},
                **{"loss_spikes": self.loss_spikes, "rollbacks": self.rollbacks},
                "loss": self._spikes.state() if self._spikes is not None else None,
            }
        )

    def load(self, state: str) -> None:
        """Go on from what `state` returned, and forget what was made since."""
        saved = json.loads(state)
        self._noted.forget()
        self.skipped_steps, self._recent = saved["skipped_steps"], saved["recent"]
        self.loss_spikes, self.rollbacks = saved["loss_spikes"], saved["rollbacks"]
        self.spike = None
        if self._spikes is not None and saved["loss"] is not None:
            self._spikes.load(saved["loss"])


def apply_update(optimizers: Any, wrong: torch.Tensor) -> None:
    """Make an optimizer step, which changes nothing where `wrong` is true: no weight, no state, no count of steps.

    Args:
        optimizers: torchtitan's container of Adam or AdamW.
        wrong: bool scalar on the device, the same on every rank.
    """
    fused = [optimizer for optimizer in optimizers if optimizer.param_groups[0].get("fused")]
    for optimizer in optimizers:
        if optimizer in fused:
            # What a gradient scaler would say; the kernel asks it. Where parameters are on the host, the host waits.
            optimizer.found_inf = wrong.float().to(optimizer.param_groups[0]["params"][0].device)
        elif bool(wrong):
            _make_state(optimizer)
            optimizer.zero_grad()  # without gradients nothing is done
    try:
        optimizers.step()
    finally:
        for optimizer in fused:
            del optimizer.found_inf


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer that has made no step its state: a checkpoint would make one by a step of its own."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    **{name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")},
                }


def _shown(rows: range) -> str:
    return f"{rows.start} to {rows[-1]}"
