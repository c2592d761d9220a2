"""The tests' own house: what they share is in tests/helpers, so that any of them can move or run alone."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("*.py"))


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(TESTS)) for path in MODULES])
def test_no_module_imports_a_test_module(path):
    parts = [name.split(".") for name in imported(path) if name.startswith("tests.")]
    assert not [name for name in parts if any(part.startswith("test_") or part == "conftest" for part in name)]
