"""What the options of every command may be: types for argparse, numbers with their bounds, paths as they must be.

A type is called with what the user wrote, before anything is made or loaded, and refuses in one sentence:

    blt-titan score: error: --lanes 0: must be a whole number from 1 to 4,096
    evaluate: error: --out '': must not be empty

Every option of every command has one of these types or `choices`; `tests/commands/test_arguments.py` walks them all.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from blt_titan.data.store.names import plain_name

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_ARGPARSE_SAYS = r"invalid choice|expected|not allowed|ignored"
_NOT_A_RESULT = re.compile(
    r".*\.(arrow|npy|distcp|safetensors|pth|parquet|toml)|(manifest|sidecar|config|params)\.json|\.metadata"
)
"""Files of data sets, models and runs; no command writes figures under such a name."""

SIZES = "Sizes are bytes, or a number with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024)."


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence, which begins with the option and what was given."""

    def __init__(self, prog: str, description: str | None, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, **options)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.12.5 argparse takes the value of `--option=--` for the mark that ends the options.
        if action.nargs is None and action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the usage, and end with exit code 2."""
        said = re.sub(rf"^argument (\S+): (?!{_ARGPARSE_SAYS})", r"\1 ", message).removeprefix("argument ")
        self.exit(2, f"{self.prog}: error: {' '.join(said.splitlines())}\n")


@dataclass(frozen=True)
class Number:
    """A number within bounds, as the type of an option; `nan` is outside all bounds."""

    read: Callable[[str], Any]
    kind: str
    """As in "a whole number"."""
    least: float
    most: float
    above_least: bool = False
    """Leave out `least` itself."""
    below_most: bool = False
    """Leave out `most` itself."""
    or_zero: bool = False
    """Allow 0 as well."""

    def __call__(self, text: str) -> Any:
        """Read what the user wrote."""
        try:
            value = self.read(text)
        except (ValueError, ArithmeticError):
            self._refuse(text)
        if not self.holds(value):
            self._refuse(text)
        return value

    def holds(self, value: float) -> bool:
        """Tell whether a value is within the bounds."""
        inside = self.least <= value <= self.most or (self.or_zero and value == 0)
        return (
            inside and not (self.above_least and value == self.least) and not (self.below_most and value == self.most)
        )

    def _refuse(self, text: str) -> NoReturn:
        least = f"above {_figure(self.least)}, at most" if self.above_least else f"from {_figure(self.least)} to"
        most = f"below {_figure(self.most)}" if self.below_most else _figure(self.most)
        zero = "0, or " if self.or_zero else ""
        raise argparse.ArgumentTypeError(f"{_shown(text)}: must be {zero}{self.kind} {least} {most}") from None


def whole(least: int, most: int) -> Number:
    """Return the type of whole numbers within bounds, both included."""
    return Number(int, "a whole number", least, most)


def number(least: float, most: float, **exclusive: bool) -> Number:
    """Return the type of finite numbers within bounds; see `Number` for how to leave a bound out."""
    return Number(float, "a number", least, most, **exclusive)


def size_from(least: int, most: int = 2**50) -> Number:
    """Return the type of sizes within bounds, both included."""
    return Number(size, "a size of bytes", least, most)


SEED = whole(0, 2**63 - 1)
NATS = number(-100, 100)
COUNT = whole(1, 10**12)
BATCH = whole(1, 4096)
MODEL_CONTEXT = whole(2, 2**24)
"""Bytes that a model reads at once."""
MOST_PATCH_BYTES = 65_536


def size(text: str) -> int:
    """Read a number of bytes.

    >>> size("16KiB"), size("4MB"), size("1.5 GiB"), size("300")
    (16384, 4000000, 1610612736, 300)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 16KiB, 4MB, 1GiB, or a number of bytes")
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]])


def filled(text: str) -> str:
    """Refuse what is empty, as an unset variable of a shell is."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: must not be empty")
    return text


def plain(text: str) -> str:
    """Refuse a name that would lead out of its folder."""
    try:
        return plain_name(filled(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def module_name(text: str) -> str:
    """Refuse what cannot be the dotted name of a Python module."""
    if not all(part.isidentifier() for part in filled(text).split(".")):
        raise argparse.ArgumentTypeError(f"{_shown(text)}: must be the name of a Python module, such as my_rules")
    return text


def existing_directory(text: str) -> str:
    """Refuse what is not a directory of this machine."""
    if not os.path.isdir(filled(text)):
        found = "is a file, not a directory" if os.path.exists(text) else "no such directory"
        raise argparse.ArgumentTypeError(f"{_shown(text)}: {found}")
    return text


def directory_or_url(text: str) -> str:
    """Refuse what is neither a directory of this machine nor a URL."""
    return text if _is_url(text) else existing_directory(text)


def existing_file(text: str) -> Path:
    """Refuse what is not a file that can be read."""
    if os.path.isdir(filled(text)):
        raise argparse.ArgumentTypeError(f"{_shown(text)}: is a directory, not a file")
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{_shown(text)}: no such file")
    if not os.access(text, os.R_OK):
        raise argparse.ArgumentTypeError(f"{_shown(text)}: cannot be read; check its permissions")
    return Path(text)


def model(text: str) -> str:
    """Refuse what is neither a directory nor can be the name of a repository of the hub."""
    if not os.path.isdir(filled(text)) and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"{_shown(text)}: no such directory, and not the name of a repository (owner/name)"
        )
    return text


def output_file(text: str) -> Path:
    """Refuse what cannot be written as a file; what is there now stays as it is."""
    path = Path(filled(text))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{_shown(text)}: is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{_shown(text)}: its directory does not exist")
    if os.path.exists(path) and _NOT_A_RESULT.fullmatch(path.resolve().name):
        raise argparse.ArgumentTypeError(f"{_shown(text)}: is a file of data, of a model or of a run; name another")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{_shown(text)}: cannot be written; check its permissions")
    if not _is_special(path):
        _probe(path.resolve().parent, text)
    return path


def png_file(text: str) -> Path:
    """Refuse what cannot be written as a picture."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{_shown(text)}: must be a file whose name ends in .png")
    return output_file(text)


def output_directory(text: str) -> str:
    """Refuse what cannot be written as a directory; it may be there, or be made."""
    path = Path(filled(text)).absolute()
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{_shown(text)}: {existing} is not a directory")
    _probe(existing, text)
    return text


def output_directory_or_url(text: str) -> str:
    """Refuse what is neither a URL nor a directory that can be written."""
    return text if _is_url(text) else output_directory(text)


def write_output(path: Path, content: str) -> None:
    """Write a text file whole or not at all; a device or a pipe takes it as it comes.

    Raises:
        OSError: naming the path.
    """
    path = path if _is_special(path) else path.resolve()
    partial = path if _is_special(path) else path.with_name(f".{path.name[:100]}.{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        if partial != path:
            os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if partial != path:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name an output in errors of the operating system that name no file, as those of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_special(path: Path) -> bool:
    return os.path.exists(path) and not path.is_file()


def _is_url(text: str) -> bool:
    return "://" in filled(text)


def _probe(folder: Path, text: str) -> None:
    # Permissions alone do not say it: a file system may be read-only, or hold no files at all.
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{_shown(text)}: cannot be written in {folder} ({error.strerror})") from None


def _shown(text: str) -> str:
    return text if text.isprintable() and text.strip() == text != "" else repr(text)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
