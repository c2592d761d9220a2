"""The house itself: sizes that can be read at a sitting, a map that is true, tests that stand alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
ROOMS = ("blt_titan", "parallelisms", "scripts", "benchmarks", "examples", "tests")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 80


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", [path for path in MODULES if TESTS in path.parents], ids=name_of)
def test_no_module_imports_a_test_module(path):
    parts = [name.split(".") for name in imported(path) if name.startswith("tests.")]
    assert not [name for name in parts if any(part.startswith("test_") or part == "conftest" for part in name)]


def test_docstrings_begin_with_what_the_thing_is():
    loose = []
    for path in MODULES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r' *r?"""(Of|Whether that|With which) ', line):
                loose.append(f"{name_of(path)}:{number}")
    assert not loose


PATHS = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)`")
PLACES_OF_USERS = ("entropy_model/", "outputs/", "tb/", "apps/", "data/stdlib", "data/web", "data/mine")
PAGES = ["CONTRIBUTING.md", "README.md", *(name_of(page) for page in sorted(ROOT.glob("*/**/*.md")))]
PAGES = [page for page in PAGES if not page.startswith((".", "site"))]
ENDINGS = (".py", ".md", ".sh", ".toml", "/")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page):
    """Paths are read from the top, from the package, from the page's folder, or from a room that the line names."""
    missing = []
    for line in (ROOT / page).read_text().splitlines():
        named = [path for path in PATHS.findall(line) if path.endswith(ENDINGS) and "/" in path]
        rooms = [ROOT, ROOT / "blt_titan", (ROOT / page).parent, *((ROOT / "blt_titan" / p).parent for p in named)]
        rooms += [(ROOT / p).parent for p in named]
        for path in named:
            if not path.startswith(PLACES_OF_USERS) and not any((room / path).exists() for room in rooms):
                missing.append(path)
    assert not missing


def test_the_map_names_every_room_and_nothing_else():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = re.search(r"## Where things are\n\n```\n(.*?)```", text, re.DOTALL)
    assert drawn
    rooms = set(re.findall(r"^ {2,4}(\w+)/", drawn[1], re.MULTILINE))
    packages = {path.parent for path in (ROOT / "blt_titan").rglob("__init__.py")} - {ROOT / "blt_titan"}
    assert rooms == {package.name for package in packages} - {"verify", "rules"}


def test_each_question_of_where_has_a_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("### Where is X decided?")[1].split("\n## ")[0]
    answers = re.findall(r"^\| [^|]+\? \| ([^|]+) \|$", table, re.MULTILINE)
    assert len(answers) >= 10
    for answer in answers:
        files = re.findall(r"`([\w/]+\.py)`", answer)
        assert files, answer
        for file in files:
            beside = Path(files[0]).parent / file
            assert any((ROOT / place / name).is_file() for place in ("", "blt_titan") for name in (file, beside)), file
