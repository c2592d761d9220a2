"""What lies in a folder of runs, as figures: data in, lists of points out.

    outputs/demo/metrics.jsonl           curves of a run, and with others a point of the scaling figure
    outputs/demo/patch_lengths.json      a histogram (`blt-titan calibrate` --json, `blt-titan demo`)
    outputs/demo/patches.html            a page of its own (`blt-titan view`)
    outputs/demo/loss.png                an image

Names are paths below the folder. What a name leads to outside of it, by `..` or by a link, does not exist. A file that
is damaged takes nothing else off the page: what can be read of it is shown, and a note says what cannot.
"""

import errno
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import quote

from blt_titan.plots.metrics_file import BEYOND, RunMetrics, check_number, open_regular
from blt_titan.plots.model_name import BLT, SETTINGS, model_name

METRICS, PATCH_LENGTHS = "metrics.jsonl", "patch_lengths.json"
IMAGES, PAGES, DATA = (".png", ".svg", ".jpg", ".jpeg"), (".html",), (".json", ".jsonl")
CURVES, SCALING = "curves", "scaling"
_NOT_LOOKED_AT = ("checkpoint", "comm_traces", "tb")
_MOST_LENGTHS_BYTES = 1 << 20


class Figure(NamedTuple):
    """Something to look at."""

    name: str
    kind: str
    """curves, scaling, lengths, page or image."""
    title: str
    url: str
    data: Any = None
    """What is drawn: JSON."""

    def listed(self) -> dict[str, str]:
        """Return all but the data."""
        return {"name": self.name, "kind": self.kind, "title": self.title, "url": self.url}


class Seen(NamedTuple):
    """What a folder held when it was looked at."""

    figures: list[Figure]
    curves: list[dict[str, Any]]
    """Each run's points (step, bits per byte) of training and of held-out text; how many lines were no metrics."""
    scaling: list[dict[str, Any]]
    """For each BLT that was validated, training FLOPs and held-out bits per byte where these were best."""
    notes: list[str]
    """What could not be read, each naming its file."""


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
        self._metrics: dict[Path, RunMetrics] = {}
        self._lock = Lock()

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

    def look(self) -> Seen:
        """Read what there is to see."""
        with self._lock:
            return self._look()

    def _look(self) -> Seen:
        notes: list[str] = []
        files = list(self._files(notes))
        figures, curves, scaling = [], [], []
        others, unsure = [], []
        known, self._metrics = self._metrics, {}
        for path in files:
            if path.name != METRICS or (metrics := self._read(path, known, notes)) is None:
                continue
            run = shown(self._name(path.parent))
            curves.append(
                {
                    "run": run,
                    "training": metrics.training.points(),
                    "heldout": metrics.heldout.points(),
                    "skipped_lines": metrics.skipped,
                }
            )
            model, fault = model_name(path.parent, metrics)
            if fault:
                notes.append(f"{shown(self._name(path.with_name(SETTINGS)))}: {fault}")
            if metrics.best is None:
                continue
            if model in ("", BLT):
                scaling.append({"run": run, **metrics.best})
                unsure += [] if model else [run]
            else:
                others.append(f"{run} ({model})")
        scaling.sort(key=lambda point: point["flops"])
        if curves:
            figures.append(Figure(CURVES, "curves", "Bits per byte", f"/visualizations/{CURVES}", curves))
        if scaling:
            data = {"points": scaling, "others": others, "unsure": unsure}
            title = "Scaling: held-out bits per byte"
            figures.append(Figure(SCALING, "scaling", title, f"/visualizations/{SCALING}", data))
        for path in files:
            if path.name == PATCH_LENGTHS:
                figures += self._lengths(path, notes)
        for suffixes, kind, place in ((PAGES, "page", "visualizations"), (IMAGES, "image", "images")):
            for path in files:
                if path.suffix in suffixes:
                    name = self._name(path)
                    figures.append(Figure(shown(name), kind, shown(name), f"/{place}/{_quoted(name)}"))
        return Seen(figures, curves, scaling, notes)

    def _read(self, path: Path, known: dict[Path, RunMetrics], notes: list[str]) -> RunMetrics | None:
        """Return a run's metrics, read on from where they were read to before; None if they cannot be read."""
        metrics = known.get(path) or RunMetrics(path)
        try:
            metrics.update()
        except OSError as error:
            if error.errno != errno.ENOENT:  # gone by now
                notes.append(f"{shown(self._name(path))}: cannot be read: {error.strerror or error}")
            return None
        self._metrics[path] = metrics
        if note := metrics.note():
            notes.append(f"{shown(self._name(path))}: {note}")
        return metrics

    def _lengths(self, path: Path, notes: list[str]) -> Iterator[Figure]:
        name = self._name(path)
        try:
            with open_regular(path) as file:
                data = _distribution(file.read(_MOST_LENGTHS_BYTES + 1))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            notes.append(f"{shown(name)}: cannot be read: {getattr(error, 'strerror', None) or error}")
            return
        title = f"Patch lengths: {shown(self._name(path.parent))}"
        yield Figure(shown(name), "lengths", title, f"/visualizations/{_quoted(name)}", data)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _files(self, notes: list[str]) -> Iterator[Path]:
        """Yield files inside the folder that may be shown, in order; checkpoints are not searched."""
        folders = [self.root]
        while folders:
            folder = folders.pop(0)
            try:
                children = sorted(folder.iterdir())
            except OSError as error:
                if folder == self.root or error.errno != errno.ENOENT:
                    notes.append(f"{shown(self._name(folder))}: cannot be read: {error.strerror or error}")
                continue
            for path in children:
                try:
                    mode, is_link = path.stat().st_mode, path.is_symlink()
                except OSError:
                    continue  # gone by now, or a link to nowhere
                if path.name in (METRICS, PATCH_LENGTHS) and not stat.S_ISREG(mode):
                    notes.append(f"{shown(self._name(path))}: cannot be read: not a regular file")
                elif stat.S_ISREG(mode):
                    is_figure = path.name in (METRICS, PATCH_LENGTHS) or path.suffix in IMAGES + PAGES
                    if is_figure and self.find(self._name(path), (path.suffix.lower(),)) is not None:
                        yield path
                elif (
                    stat.S_ISDIR(mode)
                    and not is_link
                    and path.name not in _NOT_LOOKED_AT
                    and not path.name.startswith(".")
                ):
                    folders.append(path)


def shown(name: str) -> str:
    r"""Return a file's name as text; bytes of it that are not UTF-8 become `\xff`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _quoted(name: str) -> str:
    return quote(os.fsencode(name))


def _distribution(content: bytes) -> dict[str, Any]:
    """Return what a file of patch lengths holds.

    Raises:
        ValueError: it is none.
    """
    if len(content) > _MOST_LENGTHS_BYTES:
        raise ValueError(f"longer than {_MOST_LENGTHS_BYTES:,} bytes")
    data = json.loads(content)
    if not isinstance(data, dict) or not isinstance(data.get("counts"), list):
        raise ValueError('no object with a list of "counts"')
    for count in data["counts"]:
        check_number("counts", count)
    for key in ("threshold", "mean"):
        if data.get(key) is not None:
            check_number(key, data[key], least=-BEYOND)
    if not isinstance(data.get("rule"), str | None):
        raise ValueError(f'"rule" is {reprlib.repr(data["rule"])}, not a name')
    return {key: data.get(key) for key in ("rule", "threshold", "mean", "counts")}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
