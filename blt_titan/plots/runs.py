"""What lies in a folder of runs, as figures: data in, lists of points out.

    outputs/demo/metrics.jsonl           curves of a run, and with others a point of the scaling figure
    outputs/demo/patch_lengths.json      a histogram (scripts.calibrate_threshold --json, scripts.demo)
    outputs/demo/patches.html            a page of its own (scripts.view_patches)
    outputs/demo/loss.png                an image

Names are paths below the folder. What a name leads to outside of it, by `..` or by a link, does not exist.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

METRICS, PATCH_LENGTHS = "metrics.jsonl", "patch_lengths.json"
IMAGES, PAGES, DATA = (".png", ".svg", ".jpg", ".jpeg"), (".html",), (".json", ".jsonl")
CURVES, SCALING = "curves", "scaling"
MOST_POINTS = 2000
"""Of a curve; a longer one is thinned."""
_NOT_LOOKED_AT = ("checkpoint", "comm_traces", "tb")


class Figure(NamedTuple):
    """Something to look at."""

    name: str
    kind: str
    """curves, scaling, lengths, page or image."""
    title: str
    url: str


class RunsFolder:
    """A folder of runs.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such directory")
        self.root = root.resolve()

    def find(self, name: str, suffixes: tuple[str, ...]) -> Path | None:
        """Return the file of a name, if it is a file of one of these kinds inside the folder; else None."""
        if "\0" in name or Path(name).suffix.lower() not in suffixes:
            return None
        try:
            path = (self.root / name).resolve(strict=True)
        except (OSError, RuntimeError):
            return None
        inside = path.is_relative_to(self.root) and path.suffix.lower() in suffixes
        return path if inside and path.is_file() and not _is_hidden(path.relative_to(self.root)) else None

    def figures(self) -> list[Figure]:
        """List what there is to see."""
        found = []
        if any(True for _ in self._files(METRICS)):
            found.append(Figure(CURVES, "curves", "Bits per byte", f"/visualizations/{CURVES}"))
            if self.scaling():
                found.append(
                    Figure(SCALING, "scaling", "Scaling: held-out bits per byte", f"/visualizations/{SCALING}")
                )
        for path in self._files(PATCH_LENGTHS):
            name = self._name(path)
            found.append(
                Figure(name, "lengths", f"Patch lengths: {Path(name).parent}", f"/visualizations/{quote(name)}")
            )
        for suffixes, kind, place in ((PAGES, "page", "visualizations"), (IMAGES, "image", "images")):
            for path in self._files(*(f"*{suffix}" for suffix in suffixes)):
                name = self._name(path)
                found.append(Figure(name, kind, name, f"/{place}/{quote(name)}"))
        return found

    def curves(self) -> list[dict[str, Any]]:
        """Return each run's curves: points (step, bits per byte) of training and of held-out text."""
        runs = []
        for path in self._files(METRICS):
            lines = list(read_metrics(path))
            runs.append(
                {
                    "run": str(Path(self._name(path)).parent),
                    "training": _points(lines, "step", "bits_per_byte"),
                    "heldout": _points(lines, "step", "heldout_bits_per_byte"),
                }
            )
        return runs

    def scaling(self) -> list[dict[str, Any]]:
        """Return a point for each run that was validated: training FLOPs so far, best held-out bits per byte."""
        points = []
        for path in self._files(METRICS):
            flops, best = None, None
            for line in read_metrics(path):
                flops = line.get("training_flops") or flops
                held_out = line.get("heldout_bits_per_byte")
                if flops and held_out is not None and (best is None or held_out < best["bits_per_byte"]):
                    best = {"flops": flops, "bits_per_byte": held_out, "step": line["step"]}
            if best is not None:
                points.append({"run": str(Path(self._name(path)).parent), **best})
        return sorted(points, key=lambda point: point["flops"])

    def lengths(self, name: str) -> dict[str, Any] | None:
        """Return what a histogram's file holds; None if it is none."""
        path = self.find(name, (".json",))
        if path is None or path.name != PATCH_LENGTHS:
            return None
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            return None
        return content if isinstance(content, dict) and isinstance(content.get("counts"), list) else None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _files(self, *patterns: str) -> Iterator[Path]:
        """Yield files inside the folder, in order; checkpoints are not searched."""
        folders = [self.root]
        while folders:
            folder = folders.pop(0)
            try:
                children = sorted(folder.iterdir())
            except OSError:
                continue  # not ours to read
            for path in children:
                if path.is_file() and any(path.match(pattern) for pattern in patterns):
                    if self.find(self._name(path), (path.suffix.lower(),)) is not None:
                        yield path
                elif (
                    path.is_dir()
                    and not path.is_symlink()
                    and path.name not in _NOT_LOOKED_AT
                    and not path.name.startswith(".")
                ):
                    folders.append(path)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics; one that is being written is left out."""
    for line in path.read_text(errors="replace").split("\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            yield content


def _points(lines: list[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    points = [(line[x], line[y]) for line in lines if isinstance(line.get(y), int | float) and math.isfinite(line[y])]
    step = -(-len(points) // MOST_POINTS)
    # The last one is always there.
    return points[::-step][::-1] if step > 1 else points


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
