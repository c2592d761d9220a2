"""Watches a run on rank 0: looks at each logged line, warns, and keeps those who ask from outside up to date.

In: the lines. Out: figures for the metrics, warnings in the log, and whatever `[monitor]` asks for. Nothing here may
stop a run.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from blt_titan.job_config import Monitor
from blt_titan.monitor.prometheus import Exporter, TextFile, exposition
from blt_titan.monitor.record import REASONS, End, RunRecord
from blt_titan.monitor.watch import Line, RunWatch
from blt_titan.monitor.webhook import Webhook

logger = logging.getLogger(__name__)


class RunMonitor:
    """What watches one run.

    Args:
        settings: `[monitor]`.
        record: what the run says of itself in its folder.
        run: its name, for those outside: the dump folder.
        steps: that it will have made in the end.
        hosts: of each rank.
        stages: of the pipeline.
        sharing: ranks that share rows.
        clock: seconds, by which warnings are not said too often.
    """

    def __init__(
        self,
        settings: Monitor,
        *,
        record: RunRecord,
        run: str,
        steps: int,
        hosts: Sequence[str],
        stages: int = 1,
        sharing: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._watch = RunWatch(settings, hosts=hosts, stages=stages, sharing=sharing)
        self._record, self._run, self._steps, self._clock = record, run, steps, clock
        self._repeat_s = settings.repeat_s
        self._said_at: dict[tuple[str, str], float] = {}
        self._warnings: Counter[str] = Counter()
        self._newest: dict[str, float] = {}
        self._webhook = Webhook(settings.webhook) if settings.webhook else None
        self._text_file = TextFile(settings.prometheus_textfile) if settings.prometheus_textfile else None
        self._exporter = _exporter(settings.prometheus_port) if settings.prometheus_port else None
        record.on_end = self._ended

    def look(self, line: Line) -> dict[str, float]:
        """Look at a logged line, warn where it is due, and return figures that go beside the line's own."""
        figures, alerts = self._watch.look(line)
        for alert in alerts:
            self._warnings[alert.kind] += 1
            key, now = (alert.kind, alert.subject), self._clock()
            if key in self._said_at and now - self._said_at[key] < self._repeat_s:
                continue
            self._said_at[key] = now
            logger.warning(f"step {line.step:>6}  warning: {alert.sentence}")
            self._record.warning(line.step, alert.sentence)
            self._send(alert.kind, line.step, alert.sentence)
        return figures

    def publish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the newest figures of a step: of a logged line, or of a validation pass."""
        self._newest |= metrics
        self._newest["step"] = step
        if (rate := metrics.get("bytes_per_second")) is not None:
            self._record.line(step, bytes_per_second=rate, bits_per_byte=metrics.get("bits_per_byte"))
        if (held_out := metrics.get("heldout_bits_per_byte")) is not None:
            self._record.held_out(step, held_out)
        self._expose()

    def close(self) -> None:
        """End what runs beside the training."""
        if self._webhook is not None:
            self._webhook.close()
            self._webhook = None
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None

    def _ended(self, end: End) -> None:
        self._newest["step"] = end.step
        self._expose(reason=end.reason)
        self._send(f"end: {end.reason}", end.step, end.sentence)
        if self._webhook is not None:  # the process may leave at once
            self._webhook.close()
            self._webhook = None

    def _send(self, kind: str, step: int, sentence: str) -> None:
        if self._webhook is None:
            return
        text = f"{self._run}, step {step} of {self._steps}, {kind}: {sentence}"
        said = {"run": self._run, "host": socket.gethostname(), "time": time.time(), "kind": kind}
        # "text" is what chats show.
        self._webhook.send({**said, "step": step, "steps": self._steps, "sentence": sentence, "text": text})

    def _expose(self, reason: str | None = None) -> None:
        if self._text_file is None and self._exporter is None:
            return
        ended = {f"ended_{name}": float(name == reason) for name in REASONS}
        gauges = {"steps": float(self._steps), "written_seconds": time.time(), **ended, **self._newest}
        text = exposition(self._run, gauges, self._warnings)
        if self._text_file is not None:
            self._text_file.write(text)
        if self._exporter is not None:
            self._exporter.text = text


def _exporter(port: int) -> Exporter | None:
    try:
        return Exporter(port)
    except OSError as error:
        logger.warning(f"monitor.prometheus_port = {port}: cannot be listened at ({error.strerror}); the run goes on")
        return None
