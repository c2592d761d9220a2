"""A store behind HTTP: which answers of its server are final, and which may pass."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blt_titan.data.store import object_store
from blt_titan.data.store.address import Address
from blt_titan.data.store.errors import UnreachableError
from blt_titan.data.store.object_store import Fetching, RemoteFolder

CONTENT = b"what is asked for"


@contextmanager
def web(*statuses: int) -> Iterator[tuple[str, list[str]]]:
    """Serve CONTENT to whoever asks, after answers of these statuses; gives the address, and what was asked for."""
    asked: list[str] = []
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(left.pop(0) if left else 200)
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
