"""`uv.lock` and `scripts/constraints.txt` name the same versions, so that uv and pip make the same environment."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def same(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_and_the_constraints_agree():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    # More than one where Python's versions need it.
    locked: dict[str, set[str]] = {}
    for package in packages:
        locked.setdefault(same(package["name"]), set()).add(package.get("version", ""))
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pins = {same(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    [torch] = re.findall(r"torch==([\d.]+)", (ROOT / "scripts/setup.sh").read_text())
    pins["torch"] = torch
    differ = {name: (pin, locked[name]) for name, pin in pins.items() if pin not in locked.get(name, {pin})}
    assert not differ, "constraint, lock; `uv lock --upgrade-package NAME==VERSION` changes the lock"
    assert len(pins.keys() & locked.keys()) > 80


def test_the_lock_is_of_the_requirements_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    [own] = [package for package in packages if same(package["name"]) == same(project["name"])]
    for extra, lines in project["optional-dependencies"].items():
        found = {same(re.match(r"[\w.-]+", line)[0]) for line in lines}
        locked = {same(package["name"]) for package in own["optional-dependencies"][extra]}
        # An extra of ours that another takes in is in the lock by what it requires.
        assert found - {same(project["name"])} <= locked, f"{extra}: run `uv lock`"
    assert {same(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]} <= {
        same(package["name"]) for package in own["dependencies"]
    }
