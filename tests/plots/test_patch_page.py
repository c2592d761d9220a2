"""The page of patches in a real browser: it cuts as `patching` does, at any threshold, and breaks on no byte."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from blt_titan.patching import patch_lengths
from blt_titan.plots.patch_page import patch_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

TEXT = b"</script><b>to be</b>, or\nnot \xf0\x9f\x98\x80 \xff\x00\tto be & \xc3\xa9" * 4
MAX_PATCH_BYTES = 7


@pytest.fixture(scope="module")
def entropies() -> np.ndarray:
    return np.random.default_rng(0).gamma(1.5, 0.8, len(TEXT)).astype(np.float16).astype(np.float32)


def page_of(entropies: np.ndarray, threshold: float) -> str:
    return patch_page(TEXT, entropies, title="<i>a & b</i>", threshold=threshold, max_patch_bytes=MAX_PATCH_BYTES)


def in_browser(page: str, folder: Path, *, script: str = "") -> str:
    """The page's document after its scripts ran, and then `script`."""
    assert CHROMIUM is not None
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, f"file://{folder / 'page.html'}"], capture_output=True, check=True, timeout=120
    )
    return done.stdout.decode()


def drawn_lengths(document: str) -> list[int]:
    text = document[document.index('<div id="text">') : document.index('<p class="note">')]
    return [patch.count('class="byte') for patch in text.split('<span class="patch')[1:]]


def expected_lengths(entropies: np.ndarray, threshold: float) -> list[int]:
    """Lengths for the document with BOS and EOS, which the page does not show."""
    h = np.concatenate([[0], entropies, [0]])
    lengths = patch_lengths(h, threshold, max_patch_bytes=MAX_PATCH_BYTES).tolist()
    assert lengths[0] == 1
    return [*lengths[1:-1], lengths[-1] - 1] if lengths[-1] > 1 else lengths[1:-1]


@needs_browser
@pytest.mark.parametrize("threshold", [0.3, 1.335])
def test_the_browser_cuts_as_we_do(entropies, threshold, tmp_path):
    document = in_browser(page_of(entropies, threshold), tmp_path)
    lengths = drawn_lengths(document)
    assert lengths == expected_lengths(entropies, threshold)
    assert f"{len(lengths)} patches, {len(TEXT) / len(lengths):.2f} bytes on average" in document
    assert document.count('class="byte') == len(TEXT)
    assert ">😀</span>" in document


@needs_browser
def test_the_slider_and_the_curve_draw_the_patches_anew(entropies, tmp_path):
    slide = "const s = document.getElementById('slider'); s.value = 2.5; s.dispatchEvent(new Event('input'));"
    document = in_browser(page_of(entropies, 0.3), tmp_path, script=slide)
    assert drawn_lengths(document) == expected_lengths(entropies, 2.5) != expected_lengths(entropies, 0.3)
    assert '<output id="threshold">2.5000</output>' in document
    drag = """const c = document.getElementById('curve'), b = c.getBoundingClientRect();
        c.dispatchEvent(new PointerEvent('pointerdown', {clientY: b.top + b.height / 2, buttons: 1}));"""
    document = in_browser(page_of(entropies, 0.3), tmp_path, script=drag)
    found = re.search(r'<output id="threshold">([\d.]+)</output>', document)
    assert found
    assert abs(float(found[1]) - 2.8) < 0.05


@needs_browser
def test_pointing_at_a_byte_shows_its_figures(entropies, tmp_path):
    point = """document.querySelectorAll('.byte')[3].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"""
    document = in_browser(page_of(entropies, 1.0), tmp_path, script=point)
    shown = html.unescape(document.split('<p id="info">')[1].split("</p>")[0])
    assert shown.startswith("byte 3: 0x63 c")
    assert f"{entropies[3]:.4f} nats" in shown


def test_nothing_of_a_text_is_markup(entropies):
    page = page_of(entropies, 1.0)
    assert page.count("</script>") == 1
    assert "<i>a" not in page
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", page), "nothing is loaded from outside"
