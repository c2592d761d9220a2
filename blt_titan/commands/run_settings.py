"""What `train` and `config` take: the configuration of a run, by path or by name, and overrides after it.

    blt-titan train debug --nproc 2 --training.steps=50 --optimizer.lr 1e-3
                    CONFIG          overrides are the words with a dot

In: the words of a command line. Out: those that argparse knows, and `--job.config_file=FILE` with the overrides, as
`load_run_config` reads them.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from blt_titan.commands.arguments import Parser, filled

SHIPPED = Path(__file__).resolve().parent.parent / "train_configs"
"""The configurations that are installed with the package; in a checkout a link to the folder at its top."""


def add_config(parser: Parser, **options: str) -> None:
    """Add the argument CONFIG."""
    parser.add_argument(
        "config",
        type=config_file,
        metavar="CONFIG",
        help=f"the run's TOML: a file, or a shipped one by name ({', '.join(shipped_configs())})",
        **options,  # pyright: ignore[reportArgumentType]
    )


def shipped_configs() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def config_file(text: str) -> Path:
    """Find a configuration: a file of this machine, or a shipped one by its name.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    path = Path(filled(text))
    if path.is_dir() and text not in shipped_configs():
        raise argparse.ArgumentTypeError(f"{text!r}: is a directory, not a file")
    if path.exists() and not path.is_dir():
        return path
    name = text.removesuffix(".toml")
    if name in shipped_configs():
        return SHIPPED / f"{name}.toml"
    close = difflib.get_close_matches(path.stem, shipped_configs(), n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise argparse.ArgumentTypeError(
        f"{text!r}: no such file, and not a shipped configuration ({', '.join(shipped_configs())}){meant}"
    )


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what argparse reads and the overrides, `--section.key=value` or `--section.key value`.

    >>> split_overrides(["debug", "--training.steps", "5", "--nproc", "2", "--compile.enable"])
    (['debug', '--nproc', '2'], ['--training.steps', '5', '--compile.enable'])
    """
    options: list[str] = []
    overrides: list[str] = []
    awaits_value = False
    for word in words:
        if word.startswith("--") and "." in word.partition("=")[0]:
            overrides.append(word)
            awaits_value = "=" not in word
        elif awaits_value and not word.startswith("--"):
            overrides.append(word)
            awaits_value = False
        else:
            options.append(word)
            awaits_value = False
    return options, overrides


def parse_with_overrides(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, None for this process's; `overrides` of what is returned holds the settings it changes."""
    options, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(options)
    args.overrides = overrides
    return args


def run_arguments(config: Path | None, overrides: Sequence[str]) -> list[str]:
    """Return what `load_run_config` and `blt_titan.train` take."""
    return [*([f"--job.config_file={config}"] if config else []), *overrides]
