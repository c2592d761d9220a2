"""A store behind HTTP: which answers are final, which may pass, and what a worker says while it waits for one."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blt_titan.data.rows import workers as workers_module
from blt_titan.data.rows.workers import Worker, WorkerLostError
from blt_titan.data.store import object_store
from blt_titan.data.store.address import Address
from blt_titan.data.store.errors import UnreachableError
from blt_titan.data.store.object_store import Fetching, RemoteFolder

CONTENT = b"what is asked for"


@contextmanager
def web(*statuses: int) -> Iterator[tuple[str, list[str]]]:
    """Serve CONTENT to whoever asks, after answers of these statuses, where 0 is no answer.

    Gives the address, and what was asked for.
    """
    asked: list[str] = []
    left = list(statuses)
    closed = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status = left.pop(0) if left else 200
            if not status:
                closed.wait(60)
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        closed.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "access is denied"), (403, "access is denied"), (400, "the request is refused"), (410, "the request is re")],
)
def test_a_request_that_the_server_refuses_is_made_once(status, reason, tmp_path):
    with web(*[status] * 20) as (url, asked):
        folder = RemoteFolder(Address(f"{url}/data"), Fetching(tmp_path, timeout_s=2.0))
        with pytest.raises(UnreachableError, match=rf"{url}/data/manifest.json: {reason}.* {status}"):
            folder.read("manifest.json")
        assert len(asked) == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_a_server_that_asks_for_patience_is_asked_again(status, tmp_path):
    with web(status, status) as (url, asked):
        folder = RemoteFolder(Address(f"{url}/data"), Fetching(tmp_path, timeout_s=20.0))
        assert folder.read("manifest.json") == CONTENT
        assert len(asked) == 3


def worker_that_reads(url: str, cache_dir: Path, *, timeout_s: float) -> Worker:
    def read(_number, note):
        note("it was reading")
        yield RemoteFolder(Address(f"{url}/data"), Fetching(cache_dir, timeout_s=timeout_s)).read("manifest.json")

    return Worker(0, read, ahead=1, wait_s=0.8)


def test_a_worker_whose_store_is_silent_is_not_lost_and_asks_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "_LOOK_S", 0.1)
    with web(0, 0) as (url, asked):
        worker, began = worker_that_reads(url, tmp_path, timeout_s=10.0), time.monotonic()
        assert worker.next_block() == CONTENT
        worker.close()
        # Longer than one that does nothing is waited for, and than one that is busy.
        assert time.monotonic() - began > workers_module.BUSY_WAITS * 0.8
        assert len(asked) == 3


def test_a_worker_that_is_lost_while_it_waits_for_a_store_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "_LOOK_S", 0.1)
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.5)
    with web(*[503] * 99) as (url, asked):
        worker = worker_that_reads(url, tmp_path, timeout_s=60.0)
        deadline = time.monotonic() + 30
        while len(asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(worker._process.pid or 0, signal.SIGSTOP)
        with pytest.raises(
            WorkerLostError,
            match=r"no sign of life for 1 s \(its process is stopped\); it was reading; it has waited for "
            rf"{url}/data/manifest.json for \d+\.\d s, in try [234] after ClientResponseError: 503",
        ):
            worker.next_block()
        worker.close()
