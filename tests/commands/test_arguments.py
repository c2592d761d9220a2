"""What every option of every command takes and refuses, and the types of `blt_titan/commands/arguments.py`."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import pytest

import blt_titan.commands
from blt_titan.commands import arguments
from blt_titan.commands.arguments import Number
from tests.helpers.verbs import COMMANDS, module_of, program_of

SOURCES = {path.stem: path.read_text() for path in Path(blt_titan.commands.__path__[0]).glob("*.py")}
FREE_TEXT = {"--prompt"}
"""An empty prompt is one: the model begins a text."""
BAD_NUMBERS = ["0", "-1", str(10**30), "nan", "inf", "-inf", "1e400", "", " ", "x", "1.5.2"]


def options_of(command: str) -> list[argparse.Action]:
    actions = module_of(command).make_parser()._actions
    return [action for action in actions if action.nargs != 0]


def parsed_alone(command: str, action: argparse.Action, value: str) -> tuple[Any, int | str | None]:
    """Parse one option, of which nothing else is required; return the value, or how the command ended."""
    parser = module_of(command).make_parser()
    for other in parser._actions:
        other.required = False
        other.default = None
        if not other.option_strings and other.dest != action.dest:
            other.nargs = "?"
    for group in parser._mutually_exclusive_groups:
        group.required = False
    given = [f"{action.option_strings[0]}={value}"] if action.option_strings else ["--", value]
    try:
        found = getattr(parser.parse_args(given), action.dest)
    except SystemExit as end:
        return None, end.code
    return (found[0] if isinstance(found, list) else found), None


def test_every_command_has_a_parser_to_walk():
    assert len(COMMANDS) >= 12
    assert not [name for name, source in SOURCES.items() if "ArgumentParser(" in source and name != "arguments"]
    for command in COMMANDS:
        module = module_of(command)
        assert module.make_parser().prog == program_of(command)
        assert module.main(["--no-such-option"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_type_that_refuses(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for action in options_of(command):
        name = action.option_strings[0] if action.option_strings else action.metavar
        if action.choices is None and name not in FREE_TEXT:
            assert action.type not in (None, int, float, str, Path, arguments.size), f"{command} {name}: has no bounds"
        for value in BAD_NUMBERS if isinstance(action.type, Number) else [""]:
            if name in FREE_TEXT:
                continue
            found, code = parsed_alone(command, action, value)
            said = capsys.readouterr().err
            if code is not None:
                assert code == 2
                assert said.startswith(
                    (f"{program_of(command)}: error: {name} ", f"{program_of(command)}: error: {name}: ")
                ), said
                assert said.count("\n") == 1
                continue
            assert isinstance(action.type, Number), f"{command} {name}: takes {value!r}"
            assert math.isfinite(found)
            assert action.type.least <= found <= action.type.most or (found == 0 and action.type.or_zero)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_what_the_user_may_write(command):
    for action in options_of(command):
        if isinstance(action.type, Number) and action.default is not None:
            assert action.type.holds(action.default), (command, action.dest)


def test_bounds_are_exact():
    for kind, inside, outside in (
        (arguments.whole(1, 8), ["1", "8"], ["0", "9", "1.5", "1e1"]),
        (arguments.number(0, 1, below_most=True), ["0", "0.999"], ["1", "-1e-9", "1.0000001"]),
        (arguments.number(0, 1, above_least=True), ["1", "1e-9"], ["0", "-0.0", "2"]),
        (arguments.number(1e-6, 1000, or_zero=True), ["0", "1e-6", "1000"], ["1e-7", "-1", "1001"]),
        (arguments.size_from(1024), ["1KiB", "1.024kB"], ["1KB", "0", "-1KiB", "nan"]),
    ):
        for text in inside:
            kind(text)
        for text in outside:
            with pytest.raises(argparse.ArgumentTypeError):
                kind(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^9: must be a whole number from 1 to 8$"):
        arguments.whole(1, 8)("9")


def test_names_lead_nowhere_else():
    assert arguments.plain("entropy_100m-v1.2") == "entropy_100m-v1.2"
    for text in ("", ".", "..", "../x", "/x", "a/b", "a\\b", ".hidden", "-rf", "a\0b", "a b", "é", "x" * 101, "a\n"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.plain(text)


def test_outputs_are_tried_and_left_as_they_are(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "to_data").symlink_to(tmp_path / "manifest.json")
    for kind, allowed, refused in (
        (arguments.output_file, ["file", "new", "link"], ["", ".", "no/file", "file/x", "manifest.json", "to_data"]),
        (arguments.png_file, ["a.png", "A.PNG"], ["a", "a.pdf", "", "no/a.png"]),
        (arguments.output_directory, [".", "a/b/c"], ["file", "file/x"]),
        (arguments.existing_file, ["file", "link"], ["", ".", "nothing"]),
        (arguments.existing_directory, [".", ""], ["file", "nothing"]),
    ):
        for text in allowed:
            kind(f"{tmp_path}/{text}")
        for text in refused:
            with pytest.raises(argparse.ArgumentTypeError):
                kind(f"{tmp_path}/{text}" if text else "")
    # Permissions do not tell there: nothing can be made in it, even by root.
    for kind in (arguments.output_file, arguments.output_directory):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
            kind("/proc/x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link", "manifest.json", "to_data"}
    assert (tmp_path / "file").read_text() == "mine"
    arguments.write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert arguments.output_directory_or_url("s3://bucket/data") == "s3://bucket/data"


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space left on device") as caught:
        arguments.write_output(Path("/dev/full"), "x")
    assert caught.value.filename == "/dev/full"
    path = tmp_path / "figures.json"
    path.write_text("mine")

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(arguments.os, "replace", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        arguments.write_output(path, "new")
    assert caught.value.filename == str(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("figures.json", "mine")]
