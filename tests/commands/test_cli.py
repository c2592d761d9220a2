"""The command `blt-titan` itself, and the old names of its verbs."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from blt_titan.commands import cli
from tests.helpers.verbs import VERB_OF

ROOT = Path(__file__).parents[2]


def test_help_names_every_verb_and_needs_no_torch():
    program = "import sys; from blt_titan.commands.cli import main; code = main(['--help']); "
    done = subprocess.run(
        [sys.executable, "-c", f"{program}print('torch' in sys.modules, 'numpy' in sys.modules, code)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("False False 0\n")
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_verb_it_says_how(arguments, capsys):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: blt-titan VERB")


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"blt-titan {version('blt_titan')}\n"


@pytest.mark.parametrize(("verb", "meant"), [("trian", "; did you mean train?"), ("xyz", ""), ("--data", "")])
def test_an_unknown_verb_is_one_line(verb, meant, capsys):
    assert cli.main([verb]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"blt-titan: error: no verb {verb!r}{meant} There are prepare, ")
    assert captured.err.count("\n") == 1


def test_a_verb_gets_the_arguments_after_it(capsys):
    assert cli.main(["inspect", "--no-such-option"]) == 2
    assert capsys.readouterr().err == "blt-titan inspect: error: the following arguments are required: DIR\n"


@pytest.mark.parametrize(("old", "verb"), VERB_OF.items())
def test_an_old_name_is_the_same_command(old, verb):
    script = importlib.import_module(f"scripts.{old}")
    assert script.main is importlib.import_module(f"blt_titan.commands.{cli.VERBS[verb][0]}").main


def test_old_names_run(tmp_path):
    """One process for all: what `python -m` does with each."""
    program = "import runpy, sys\n" + "".join(
        f"sys.argv = ['{old}', '--no-such-option']\n"
        f"try: runpy.run_module('scripts.{old}', run_name='__main__')\n"
        "except SystemExit as end: print(end.code)\n"
        for old in VERB_OF
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"] * len(VERB_OF)
    assert [line.split(": error: ")[0] for line in done.stderr.splitlines()] == [
        f"blt-titan {verb}" for verb in VERB_OF.values()
    ]
