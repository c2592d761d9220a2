"""An S3 server of its own process on this machine, which can be told to fail, and can be killed.

python -m tests.helpers.s3_server PORT
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

ROOT = Path(__file__).parents[2]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class S3Server:
    """A running server."""

    def __init__(self, port: int, process: subprocess.Popen):
        self.url = f"http://127.0.0.1:{port}"
        self._process = process

    def fail(self, every: int) -> None:
        """Answer every n-th request for an object with 503; 0: none."""
        urllib.request.urlopen(f"{self.url}/_fail/{every}").close()

    def failed(self) -> int:
        """How many requests were made to fail."""
        with urllib.request.urlopen(f"{self.url}/_failed") as answer:
            return int(answer.read())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server; the environment of this process points S3 drivers to it meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.helpers.s3_server", str(port)]
    before = dict(os.environ)
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    # Drivers are kept by their options, which the address of the server is none of.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    server = S3Server(port, process)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                server.failed()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not answer"
                time.sleep(0.1)
        yield server
    finally:
        server.kill()
        os.environ.clear()
        os.environ.update(before)


class _Failing:
    """Passes requests on, but for some of those for objects."""

    def __init__(self, application):
        self.application = application
        self.every = self.seen = self.failed = 0

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path.startswith("/_fail"):
            if path.startswith("/_fail/"):
                self.every = int(path.rpartition("/")[2])
            start_response("200 OK", [])
            return [str(self.failed).encode()]
        if environ["REQUEST_METHOD"] == "GET" and path.count("/") >= 2 and self.every:
            self.seen += 1
            if self.seen % self.every == 0:
                self.failed += 1
                start_response("503 Slow Down", [])
                return [b""]
        return self.application(environ, start_response)


def main(port: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, code="-", size="-"):
            pass

    application = _Failing(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", port, application, threaded=True, request_handler=Quiet).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
