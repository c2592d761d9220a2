"""Who hears of a warning: the log, a webhook, Prometheus by file and by port; and what happens where nobody listens."""

import http.server
import json
import logging
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from blt_titan.job_config import Monitor
from blt_titan.monitor.monitor import RunMonitor
from blt_titan.monitor.prometheus import CONTENT_TYPE, Exporter, exposition
from blt_titan.monitor.record import RunRecord
from blt_titan.monitor.watch import Line, RankFigures
from blt_titan.monitor.webhook import Webhook

_LABEL = r'[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"[a-zA-Z_:][\w:]*\{{{_LABEL}(?:,{_LABEL})*\}} (?:[-+]?[\d.]+(?:e[-+]?\d+)?|NaN|[-+]Inf)")
TYPE = re.compile(r"# TYPE [a-zA-Z_:][\w:]* (?:gauge|counter)")


class Receiver:
    """A server that keeps what is posted to it."""

    def __init__(self, *, status: int = 200, wait_s: float = 0.0):
        self.bodies: list[dict] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                time.sleep(wait_s)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                receiver.bodies.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, format, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook/secret"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


def slow(step: int, rank: int = 1) -> Line:
    times = [RankFigures(0.02 if r == rank else 0.01, 0.0) for r in range(2)]
    return Line(step, 1.0, 0.0, 0, 1e6, 1.0, times)


def make(tmp_path: Path, clock=time.monotonic, **settings) -> tuple[RunMonitor, RunRecord]:
    record = RunRecord()
    record.begin(tmp_path, rank=0, world_size=2, steps=100, log_freq=1, checkpoints=tmp_path / "checkpoint")
    monitor = RunMonitor(Monitor(**settings), record=record, run="out/run", steps=100, hosts=["a", "b"], clock=clock)
    return monitor, record


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_warning_is_not_repeated_too_soon_and_reaches_the_log_and_the_record(tmp_path, caplog):
    now = [0.0]
    monitor, _ = make(tmp_path, clock=lambda: now[0], repeat_s=100)
    for step in range(1, 31):
        now[0] += 10
        monitor.look(slow(step))
    said = warnings_of(caplog)
    assert [text.split()[1] for text in said] == ["6", "16", "26"]
    assert said[0].startswith("step      6  warning: rank 1 on b is slow: ")
    record = json.loads((tmp_path / "status.json").read_text())
    assert record["warning"]["step"] == 26
    assert record["warning"]["sentence"].startswith("rank 1 on b is slow: ")


def test_a_webhook_gets_each_warning_and_the_end(tmp_path):
    with Receiver() as receiver:
        monitor, record = make(tmp_path, webhook=receiver.url)
        for step in range(1, 8):
            monitor.look(slow(step))
        record.made(8)
        record.end("failed", 1, "the loss of step 8 is not finite")  # waits until it is sent
    assert [body["kind"] for body in receiver.bodies] == ["slow rank", "end: failed"]
    warned, ended = receiver.bodies
    assert (warned["run"], warned["step"], warned["steps"]) == ("out/run", 6, 100)
    assert warned["text"].startswith("out/run, step 6 of 100, slow rank: rank 1 on b is slow: ")
    assert ended["sentence"] == "the loss of step 8 is not finite"
    assert abs(ended["time"] - time.time()) < 60


@pytest.mark.parametrize("status", [500, None])
def test_a_webhook_that_fails_is_said_once_without_its_secret(status, caplog):
    with Receiver(status=status or 200) as receiver:
        url = receiver.url
        if status is not None:
            hook = Webhook(url)
            for _ in range(3):
                hook.send({"text": "x"})
            hook.close()
            assert len(receiver.bodies) == 3, "each is tried"
    if status is None:  # nobody listens any more
        hook = Webhook(url)
        for _ in range(3):
            hook.send({"text": "x"})
        hook.close()
    [said] = warnings_of(caplog)
    assert said.startswith("monitor.webhook: 127.0.0.1 was not reached (")
    assert "secret" not in said


def test_a_slow_webhook_holds_nobody_up():
    with Receiver(wait_s=5.0) as receiver:
        hook = Webhook(receiver.url, timeout_s=0.3)
        began = time.monotonic()
        for _ in range(300):
            hook.send({"text": "x"})
        assert time.monotonic() - began < 0.2
        hook.close()
        assert time.monotonic() - began < 2


def check_format(text: str) -> dict[str, str]:
    """Samples of Prometheus' text format by name and labels; fails on a line that is none."""
    typed, samples = set(), {}
    for row in text.splitlines():
        if row.startswith("#"):
            assert TYPE.fullmatch(row), row
            name = row.split()[2]
            assert name not in typed, "all samples of a metric stand together"
            typed.add(name)
        else:
            assert SAMPLE.fullmatch(row), row
            assert row.split("{")[0] == name
            key, _, value = row.rpartition(" ")
            assert key not in samples
            samples[key] = value
    assert text.endswith("\n")
    return samples


def test_the_text_format():
    gauges = {"step": 3, "loss_nats": 1.5, "mfu": float("nan"), "share/a b": 0.25, "lr": 1e-05, "share/c": 0.75}
    samples = check_format(exposition('out "x"\\\n', gauges, {"slow rank": 2, "data": 1}))
    label = r'run="out \"x\"\\\n"'
    assert samples == {
        f"blt_titan_step{{{label}}}": "3",
        f"blt_titan_loss_nats{{{label}}}": "1.5",
        f"blt_titan_mfu{{{label}}}": "NaN",
        f"blt_titan_lr{{{label}}}": "1e-05",
        f'blt_titan_data_set_share{{{label},data_set="a b"}}': "0.25",
        f'blt_titan_data_set_share{{{label},data_set="c"}}': "0.75",
        f'blt_titan_warnings_total{{{label},kind="slow rank"}}': "2",
        f'blt_titan_warnings_total{{{label},kind="data"}}': "1",
    }


def test_prometheus_by_file_and_by_port(tmp_path):
    path = tmp_path / "run.prom"
    monitor, record = make(tmp_path, prometheus_textfile=str(path))
    for step in range(1, 8):
        monitor.look(slow(step))
        monitor.publish(step, {"loss_nats": 2.0, "bytes_per_second": 100.0})
    monitor.publish(7, {"heldout_bits_per_byte": 1.25})
    samples = check_format(path.read_text())
    assert samples['blt_titan_step{run="out/run"}'] == "7"
    assert samples['blt_titan_heldout_bits_per_byte{run="out/run"}'] == "1.25"
    assert samples['blt_titan_loss_nats{run="out/run"}'] == "2.0", "a validation pass hides no other figure"
    assert samples['blt_titan_warnings_total{run="out/run",kind="slow rank"}'] == "2", "repeats count, too"
    assert samples['blt_titan_ended_preempted{run="out/run"}'] == "0.0"
    record.end("preempted", 75, "told to leave")
    assert check_format(path.read_text())['blt_titan_ended_preempted{run="out/run"}'] == "1.0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ended.json", "run.prom", "status.json"], (
        "nothing half written"
    )

    exporter = Exporter(0)
    exporter.text = path.read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=5) as answer:
        assert answer.read().decode() == exporter.text
        assert answer.headers["Content-Type"] == CONTENT_TYPE
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/", timeout=5)
    exporter.close()


def test_what_cannot_be_written_or_listened_at_is_said_once_and_stops_nothing(tmp_path, caplog):
    exporter = Exporter(0)
    monitor, record = make(tmp_path, prometheus_textfile=str(tmp_path / "none/run.prom"), prometheus_port=exporter.port)
    for step in range(3):
        monitor.publish(step, {"loss_nats": 2.0})
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    for step in range(3):
        record.held_out(step, 2.0)
    exporter.close()
    monitor.close()
    said = warnings_of(caplog)
    assert len(said) == 3
    assert (
        said[0]
        == f"monitor.prometheus_port = {exporter.port}: cannot be listened at (Address already in use); the run goes on"
    )
    assert said[1].startswith(f"monitor.prometheus_textfile: {tmp_path}/none/run.prom cannot be written (No such file")
    assert "the run's status cannot be written" in said[2]
