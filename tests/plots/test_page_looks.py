"""What the page looks like in a real browser: on a phone and a wide screen, light and dark, with many runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from blt_titan.plots.patch_page import patch_page
from tests.helpers.browser import CHROMIUM, Browser

pytest.importorskip("starlette", reason="install the dev extra to serve plots")
from starlette.testclient import TestClient

from blt_titan.plots.app import make_app

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

N_RUNS = 44
LEAST_TEXT_PX = 11
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0
"""The least of WCAG 2.1, 1.4.3 and 1.4.11."""

# Relative luminance and contrast as WCAG 2.1 defines them; a background is that of the nearest ancestor that has one.
CONTRAST = """
const rgb = color => color.match(/[0-9.]+/g).map(Number);
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = color => { const [r, g, b] = rgb(color).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = node => { for (; node; node = node.parentElement) { const color = getComputedStyle(node).backgroundColor;
  if (rgb(color)[3] !== 0) return color; } };
const contrast = (node, key) => { const [a, b] = [light(getComputedStyle(node)[key]), light(behind(node))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
const all = selector => [...document.querySelectorAll(selector)];
const least = (selector, key) => Math.min(...all(selector).map(node => contrast(node, key)));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The page of many runs and that of patches, as files."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(N_RUNS):
        run = folder / "outputs" / f"a run with a name number {number:02d}"
        run.mkdir(parents=True)
        lines = [
            {"step": step, "bits_per_byte": 2 + 1 / step, "training_flops": 1e15 * step * 3.0 ** (number % 13)}
            for step in range(1, 120_000, 12_000)
        ]
        # The last ones are not validated: they are in the curves alone.
        lines += [{"step": 120_000, "heldout_bits_per_byte": 1.9 + number / 100}] if number % 5 else []
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "patch_lengths.json").write_text(json.dumps({"rule": "global", "mean": 4.5, "counts": [9] * 40}))
    (folder / "outputs" / "bad").mkdir()
    (folder / "outputs" / "bad" / "metrics.jsonl").write_text("bad\n")
    client = TestClient(make_app(folder / "outputs"), base_url="http://127.0.0.1")
    for name, url in (("all", "/"), ("scaling", "/visualizations/scaling")):
        (folder / f"{name}.html").write_text(client.get(url).text, encoding="utf-8")
    text = b"to be, or not to be\n" * 9
    patches = patch_page(text, np.linspace(0, 5, len(text)), title="a text", threshold=1.3)
    (folder / "patches.html").write_text(patches, encoding="utf-8")
    return {path.stem: f"file://{path}" for path in Path(folder).glob("*.html")}


@pytest.mark.parametrize("width", [360, 1200])
def test_labels_are_legible_and_apart(browser, pages, width):
    browser.open(pages["all"], width=1200 if width == 360 else 360)
    # A phone that is turned around has it drawn anew.
    browser.resize(width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    found = browser.evaluate("""[...document.querySelectorAll(".chart svg")].map(svg => {
        const scale = svg.getScreenCTM().a, texts = [...svg.querySelectorAll("text")];
        const inside = svg.getBoundingClientRect(), boxes = texts.map(text => text.getBoundingClientRect());
        return { sizes: texts.map(text => parseFloat(getComputedStyle(text).fontSize) * scale),
          labels: texts.map(text => `${text.getAttribute("text-anchor")} ${text.textContent}`),
          outside: texts.filter((_, i) => boxes[i].left < inside.left || boxes[i].right > inside.right
            || boxes[i].top < inside.top || boxes[i].bottom > inside.bottom).map(text => text.textContent),
          overlaps: texts.filter((_, i) => boxes.some((box, j) => i !== j
            && box.left < boxes[i].right && boxes[i].left < box.right
            && box.top < boxes[i].bottom && boxes[i].top < box.bottom)).map(text => text.textContent) };
    })""")
    assert len(found) == 3
    for chart in found:
        assert min(chart["sizes"]) >= LEAST_TEXT_PX
        assert chart["overlaps"] == []
        assert chart["outside"] == []
        assert len(set(chart["labels"])) == len(chart["labels"]) > 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_runs_has_contrast(browser, pages, scheme):
    browser.open(pages["all"], width=1200, scheme=scheme)
    found = browser.evaluate(f"""{{ {CONTRAST}
        ({{ texts: least("h1, h2 a, p, .legend span, #notes li", "color"), labels: least("svg text", "fill"),
          back: light(behind(document.querySelector(".chart"))),
          marks: least(".mark, .point, .bar", "fill"), lines: least("polyline", "stroke") }}) }}""")
    assert found["texts"] >= TEXT_CONTRAST
    assert found["labels"] >= TEXT_CONTRAST
    assert found["marks"] >= MARK_CONTRAST
    assert found["lines"] >= MARK_CONTRAST
    assert (found["back"] < 0.05) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_patches_has_contrast(browser, pages, scheme):
    browser.open(pages["patches"], width=360, scheme=scheme)
    found = browser.evaluate(f"""{{ {CONTRAST}
        ({{ texts: least("h1, label, #count, .note, .byte", "color"), curve: least("#curve polyline, #line", "stroke"),
          width: document.documentElement.scrollWidth,
          shades: new Set(all(".byte").map(node => getComputedStyle(node).backgroundColor)).size }}) }}""")
    assert found["texts"] >= TEXT_CONTRAST
    assert found["curve"] >= MARK_CONTRAST
    assert found["width"] == 360
    assert found["shades"] > 20


def test_no_two_runs_look_alike_and_one_looks_alike_in_every_figure(browser, pages):
    browser.open(pages["all"], width=1200)
    looks = """[...document.querySelectorAll("#SECTION .legend span")].map(span => [span.dataset.run, [
        getComputedStyle(span.querySelector("polyline")).stroke,
        span.querySelector("polyline").getAttribute("stroke-dasharray"),
        getComputedStyle(span.querySelector("path")).fill, span.querySelector("path").getAttribute("d")].join(" ")])"""
    curves = dict(browser.evaluate(looks.replace("SECTION", "curves")))
    assert len(curves) == N_RUNS + 1
    assert len(set(curves.values())) == len(curves)
    # By marks alone too, which is all that the scaling figure has.
    assert len({look.split(" ", 1)[0] + look[look.index("M") :] for look in curves.values()}) == len(curves)
    scaling = dict(browser.evaluate(looks.replace("SECTION", "scaling")))
    assert 24 < len(scaling) < N_RUNS
    assert scaling.items() <= curves.items()
    drawn = """[...document.querySelectorAll("#SECTION .chart svg .CLASS")].map(node => getComputedStyle(node).KEY)"""
    lines = browser.evaluate(drawn.replace("SECTION", "curves").replace("CLASS", "training").replace("KEY", "stroke"))
    assert lines == [look[: look.index(")") + 1] for look in curves.values()]
    browser.open(pages["scaling"], width=1200)
    assert dict(browser.evaluate(looks.replace("SECTION", "scaling"))) == scaling


def test_figures_that_no_axis_was_made_for(browser, tmp_path):
    """Each draws, and none keeps the browser busy."""
    odd = {
        "huge": [(1, 1e299), (2, 1e300)],
        "tiny": [(1, 1e-300), (2, 2e-300)],
        "zero": [(0, 0.0)],
        "late": [(2**53 - 1, 2.0)],
        "long": [(1_000_000, 2.0), (1_050_000, 1.9)],
        "all but equal": [(1, 2.0), (2, 2.0 + 1e-15)],
        "diverged": [(1, 2.0), (2, 1e6)],
    }
    for name, points in odd.items():
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        lines = [{"step": step, "heldout_bits_per_byte": value, "training_flops": 1e299} for step, value in points]
        lines.insert(0, {"step": 0, "training_flops": 1e-299})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "patch_lengths.json").write_text(json.dumps({"counts": [0, 1e300] if name == "huge" else []}))
        page = TestClient(make_app(tmp_path / name), base_url="http://127.0.0.1").get("/").text
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        browser.open(f"file://{tmp_path / 'page.html'}", width=360)
        assert "cannot be drawn" not in browser.evaluate("document.body.innerText"), name
        drawn = browser.evaluate("document.getElementById('figures').innerHTML")
        assert "NaN" not in drawn, name
        assert "Infinity" not in drawn, name
        assert browser.evaluate("document.querySelectorAll('.mark, .point').length") >= len(points), name
        labels = browser.evaluate("""[...document.querySelectorAll("#curves text")].map(
            text => `${text.getAttribute("text-anchor")} ${text.textContent}`)""")
        assert 2 < len(set(labels)) == len(labels) < 30, (name, labels)
