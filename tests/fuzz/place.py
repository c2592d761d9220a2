"""The folder of one case, with copies of what it reads."""

import os
import shutil
from pathlib import Path

from tests.fuzz.draw import Draw


class Place:
    """The folder of a case: `in`, `out`, `cwd`, `tmp`.

    Args:
        folder: of the case, empty.
        base: what `make_base` wrote.
        draw: decides whether the command line has absolute paths or relative ones.
    """

    def __init__(self, folder: Path, base: Path, draw: Draw):
        self.folder, self._base = folder, base
        self._relative = draw.chance(0.5)
        for name in ("in", "cwd", "tmp"):
            (folder / name).mkdir(parents=True)

    def path(self, name: str) -> str:
        """Write a path below the folder as the command line has it."""
        path = self.folder / name
        return os.path.relpath(path, self.folder / "cwd") if self._relative else str(path)

    def copy(self, name: str, to: str = "") -> str:
        """Copy something of the base into the folder, by default to `in`; write where, as `path` does."""
        to = to or f"in/{name}"
        target = self.folder / to
        if not target.exists():
            source = self._base / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        return self.path(to)

    def changed(self, name: str) -> list[str]:
        """List the files of a copy in `in` that are not as the base has them; an empty list if there is no copy."""
        copied = self.folder / "in" / name
        if not copied.is_dir():
            return []
        originals = [path for path in (self._base / name).rglob("*") if path.is_file()]
        found = []
        for original in originals:
            path = copied / original.relative_to(self._base / name)
            if not path.is_file() or path.read_bytes() != original.read_bytes():
                found.append(f"{name}/{path.relative_to(copied).as_posix()}")
        return found
