"""The newest figures of a run for Prometheus: its text format, in a file that is replaced or on a port that is asked.

    # TYPE blt_titan_bits_per_byte gauge
    blt_titan_bits_per_byte{run="outputs/debug"} 2.1034

The format is short, so it is written here and no package is needed.
"""

import http.server
import logging
import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path

from blt_titan.data.store.atomic_file import write_atomically

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "blt_titan"


def exposition(run: str, gauges: Mapping[str, float], warnings: Mapping[str, int]) -> str:
    """Return figures in Prometheus' text format.

    Args:
        run: label of all.
        gauges: figures by name.
        warnings: how many there were since the start, by kind.

    >>> print(exposition("out", {"loss_nats": 1.5}, {}), end="")
    # TYPE blt_titan_loss_nats gauge
    blt_titan_loss_nats{run="out"} 1.5
    """
    label = f'run="{_escaped(run)}"'
    lines: list[str] = []
    data_sets = {name: value for name, value in gauges.items() if name.startswith("share/")}
    for name, value in gauges.items():
        if name not in data_sets:
            metric = f"{_PREFIX}_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"
            lines += [f"# TYPE {metric} gauge", f"{metric}{{{label}}} {_number(value)}"]
    if data_sets:
        lines.append(f"# TYPE {_PREFIX}_data_set_share gauge")
    for name, value in data_sets.items():
        data_set = _escaped(name.removeprefix("share/"))
        lines.append(f'{_PREFIX}_data_set_share{{{label},data_set="{data_set}"}} {_number(value)}')
    if warnings:
        lines.append(f"# TYPE {_PREFIX}_warnings_total counter")
    for kind, count in warnings.items():
        lines.append(f'{_PREFIX}_warnings_total{{{label},kind="{_escaped(kind)}"}} {count}')
    return "".join(line + "\n" for line in lines)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


class TextFile:
    """A file for node exporter's textfile collector; what cannot be written is said once."""

    def __init__(self, path: str):
        self._path = Path(path)
        self._failed = False

    def write(self, text: str) -> None:
        """Replace what the file holds."""
        try:
            write_atomically(self._path, text.encode(), temporary=self._path.with_name(f".{self._path.name}.tmp"))
        except OSError as error:
            if not self._failed:
                logger.warning(f"monitor.prometheus_textfile: {self._path} cannot be written ({error.strerror})")
            self._failed = True


class Exporter:
    """Answers GET /metrics on a port of all interfaces, in a thread of its own.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(self, port: int):
        self.text = ""
        exporter = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10  # a client that says nothing is not waited for

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404, "only /metrics")
                    return
                body = exporter.text.encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: a scrape is no news."""

        self._server = _Server(("", port), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that went away."""
