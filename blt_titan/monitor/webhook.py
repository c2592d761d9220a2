"""Sends what a run has to tell to a URL, from a thread of its own, so that training never waits for it."""

import json
import logging
import queue
import threading
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
_MOST_WAITING = 100


class Webhook:
    """POSTs objects as JSON, one after another; what cannot be sent is dropped, and the first failure is said.

    Args:
        url: where to; messages show its host alone, as the rest may be a secret.
        timeout_s: of one request.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S):
        self._url, self._timeout_s = url, timeout_s
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def send(self, content: dict[str, Any]) -> None:
        """Have an object sent soon."""
        try:
            self._waiting.put_nowait(content)
        except queue.Full:
            self._say("too slow: what would wait is dropped")

    def close(self, *, timeout_s: float | None = None) -> None:
        """Wait until all is sent, but no longer than a request may take."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (content := self._waiting.get()) is not None:
            request = urllib.request.Request(
                self._url,
                data=json.dumps(content).encode(),
                headers={"Content-Type": "application/json", "User-Agent": "blt_titan"},
                method="POST",
            )
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                    answer.read(1)
            except Exception as error:  # whatever a server, a proxy or a name of one answers
                self._say(getattr(error, "reason", None) or error)

    def _say(self, why: object) -> None:
        if not self._failed:
            self._failed = True
            said = " ".join(str(why).replace(self._url, "...").split())[:200]
            logger.warning(f"monitor.webhook: {urlsplit(self._url).hostname} was not reached ({said}); said once")
