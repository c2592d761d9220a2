"""A headless Chromium told what to do over its debugging pipe: a phone's width, a dark page, what stands where."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


class Browser:
    """One page, closed at the end of a `with`."""

    def __init__(self, folder: Path):
        assert CHROMIUM is not None
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        # Frames that are sandboxed have processes of their own otherwise, which do not start everywhere.
        flags += ["--disable-features=IsolateSandboxedIframes"]
        flags += ["--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
        commands, self._write = os.pipe()
        read, answers = os.pipe()
        # Chromium reads commands from file 3 and answers to file 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{answers}', CHROMIUM, *flags],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._answers, self._numbers, self._session = os.fdopen(read, "rb"), itertools.count(1), ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        os.close(self._write)

    def open(self, url: str, *, width: int, scheme: str = "light") -> None:
        """Load a page in a window `width` CSS pixels wide."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setEmulatedMedia", features=media)
        self._call("Page.navigate", url=url)
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def resize(self, width: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2, mobile=False)
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of an expression, awaited."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page, for people."""
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        answer = self._wait(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def _wait(self, is_wanted: Any) -> dict[str, Any]:
        """Return the first message that is wanted; the pytest timeout ends a wait for one that never comes."""
        taken = bytearray()
        while byte := self._answers.read(1):
            if byte != b"\0":
                taken += byte
                continue
            message = json.loads(taken)
            taken.clear()
            if is_wanted(message):
                return message
        raise AssertionError("Chromium is gone")
