"""The server of plots: what it shows, what it refuses, and that a browser draws it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from blt_titan.plots.patch_page import patch_page

pytest.importorskip("starlette", reason="install the dev extra to serve plots")
from starlette.testclient import TestClient

from blt_titan.plots.app import make_app

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452") + b"not really"


@pytest.fixture
def outputs(tmp_path) -> Path:
    """Two runs and what lies beside them; secrets outside."""
    folder = tmp_path / "outputs"
    for number, name in enumerate(("small", "large </script><b>")):
        run = folder / name
        run.mkdir(parents=True)
        lines = [
            # The small one read more, so that points of the scaling figure come in another order than curves.
            {"step": step, "bits_per_byte": 8 / step**0.3, "training_flops": 1e12 * step * (10 - 9 * number)}
            for step in range(1, 40)
        ]
        lines.insert(20, {"step": 20, "heldout_bits_per_byte": 4.0 - number, "heldout_loss_nats": 2.0})
        lines.append({"step": 39, "heldout_bits_per_byte": 3.0 - number})
        torn = '{"step": 40, "bits_per'
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    counts = [30, 20, 10] + [1] * 40
    (folder / "small" / "patch_lengths.json").write_text(json.dumps({"rule": "global", "mean": 4.5, "counts": counts}))
    (folder / "small" / "loss.png").write_bytes(PNG)
    text = b"to be, or not to be"
    page = patch_page(text, np.linspace(0, 3, len(text)), title="a text", threshold=1.3)
    (folder / "small" / "patches.html").write_text(page)
    (folder / "small" / "weights.distcp").write_bytes(b"secret")
    (folder / "small" / "checkpoint").mkdir()
    (folder / "small" / "checkpoint" / "page.html").write_text("not looked at")
    (tmp_path / "outputs2").mkdir()
    (folder / "linked").symlink_to(tmp_path)
    for suffix in ("json", "html", "png"):
        (tmp_path / f"secret.{suffix}").write_text('"secret"')
        (tmp_path / "outputs2" / f"secret.{suffix}").write_text('"secret"')
        (folder / f"link.{suffix}").symlink_to(tmp_path / f"secret.{suffix}")
        (folder / f"loop.{suffix}").symlink_to(folder / f"loop.{suffix}")
        (folder / f"masked.{suffix}").symlink_to(folder / "small" / "weights.distcp")
        (folder / "small" / f".hidden.{suffix}").write_text('"secret"')
    (folder / "inside.json").symlink_to(folder / "small" / "patch_lengths.json")
    return folder


@pytest.fixture
def client(outputs) -> TestClient:
    return TestClient(make_app(outputs), base_url="http://127.0.0.1")


def test_what_there_is(client):
    listed = {figure["name"]: figure for figure in client.get("/api/visualizations").json()}
    assert {name: figure["kind"] for name, figure in listed.items()} == {
        "curves": "curves",
        "scaling": "scaling",
        "small/patch_lengths.json": "lengths",
        "small/patches.html": "page",
        "small/loss.png": "image",
    }
    for figure in listed.values():
        answer = client.get(figure["url"])
        assert answer.status_code == 200, figure
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/images/small/loss.png").content == PNG
    assert client.get("/data/small/metrics.jsonl").text.startswith('{"step": 1,')
    assert client.get("/data/inside.json").json()["mean"] == 4.5


def test_figures_are_those_of_the_runs(client):
    curves = {run["run"]: run for run in client.get("/data/curves").json()}
    assert curves["small"]["training"][0] == [1, 8.0]
    assert len(curves["small"]["training"]) == 39
    assert curves["small"]["heldout"] == [[20, 4.0], [39, 3.0]]
    assert client.get("/data/scaling").json() == [
        {"run": "large </script><b>", "flops": 39e12, "bits_per_byte": 2.0, "step": 39},
        {"run": "small", "flops": 390e12, "bits_per_byte": 3.0, "step": 39},
    ]


ATTEMPTS = [
    "../secret.json",
    "small/../../secret.json",
    "%2e%2e/secret.json",
    "..%2fsecret.json",
    "%2e%2e%2fsecret.json",
    "%252e%252e%252fsecret.json",
    "..%5csecret.json",
    "....//secret.json",
    "link.json",
    "linked/secret.json",
    "loop.json",
    "masked.json",
    "../outputs2/secret.json",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "small/.hidden.json",
    "small/weights.distcp",
    "small/weights.distcp%00.json",
    "small",
    "",
]


@pytest.mark.parametrize("place", ["data", "images", "visualizations"])
def test_what_lies_outside_is_not_there(outputs, place):
    """Sent as they are, over a socket: a client would tidy them up."""
    process, port = _serve(outputs)
    try:
        suffix = {"data": "json", "images": "png", "visualizations": "html"}[place]
        for attempt in (a.replace("json", suffix) for a in ATTEMPTS):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
                raw.sendall(f"GET /{place}/{attempt} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
                answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
            status = int(answer.split(b" ", 2)[1])
            assert status in (400, 404, 307), (attempt, answer[:200])
            assert b"secret" not in answer.partition(b"\r\n\r\n")[2].replace(attempt.encode(), b"").replace(
                b"secret.", b""
            )
    finally:
        process.kill()
        process.wait()


def test_names_that_a_url_must_quote_and_long_runs(outputs):
    run = outputs / "a#b?c 50% off"
    run.mkdir()
    (run / "page.html").write_text("found")
    lines = [json.dumps({"step": step, "bits_per_byte": 2.0 + step % 7}) for step in range(1, 150_001)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    client = TestClient(make_app(outputs), base_url="http://127.0.0.1")
    [page] = [f for f in client.get("/api/visualizations").json() if f["name"].endswith("off/page.html")]
    assert client.get(page["url"]).text == "found"
    [curve] = [r for r in client.get("/data/curves").json() if r["run"].startswith("a#b")]
    assert 1000 < len(curve["training"]) <= 2000
    assert curve["training"][-1] == [150_000, 2.0 + 150_000 % 7]


def test_pages_are_shut_off(client):
    for url in ("/visualizations/small/patches.html", "/images/small/loss.png"):
        policy = client.get(url).headers["content-security-policy"]
        assert policy.startswith("sandbox allow-scripts; ")
    assert "sandbox" not in client.get("/").headers["content-security-policy"]
    assert client.get("/data/curves").headers["cross-origin-resource-policy"] == "same-origin"


def test_only_this_machine_s_names_are_answered(client):
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/").status_code == 405
    missing = client.get("/data/nothing.json")
    assert missing.status_code == 404
    assert missing.json()["error"] == "nothing.json: there is no such figure in this folder"


def _serve(outputs: Path) -> tuple[subprocess.Popen, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.serve_plots", "--dir", str(outputs), "--port", str(port)]
    )
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/visualizations", timeout=5).read()
            return process, port
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError("the server did not start")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_it(outputs, tmp_path):
    assert CHROMIUM is not None
    process, port = _serve(outputs)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    try:
        url = f"http://127.0.0.1:{port}/"
        drawn = subprocess.run(
            [CHROMIUM, *flags, "--virtual-time-budget=4000", "--dump-dom", url],
            capture_output=True,
            timeout=120,
            check=True,
        ).stdout.decode()
    finally:
        process.kill()
        process.wait()
    assert drawn.count('class="training"') == 2
    assert drawn.count('class="heldout"') == 2
    assert drawn.count('class="point"') == 2
    assert drawn.count('class="bar"') == 33
    assert "<b>" not in drawn.partition("<script>")[0]
    assert "large &lt;/script&gt;&lt;b&gt;: held-out 2.000" in drawn
    assert 'src="/visualizations/small/patches.html"' in drawn
    # A run has one color, in the curves and in the scaling figure, which order them otherwise.
    colored = re.findall(r'<span style="--color: ([^"]+)" data-run="([^"]+)">', drawn)
    assert len(colored) == 4
    assert len(set(colored)) == 2


def test_a_folder_that_is_not_there(tmp_path, capsys):
    from blt_titan.commands.plots import main

    assert main(["--dir", str(tmp_path / "nothing")]) == 2
    assert "no such directory" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (70_000, taken.getsockname()[1]):
            assert main(["--dir", str(tmp_path), "--port", str(port)]) == 2
            assert f"--port {port}" in capsys.readouterr().err
