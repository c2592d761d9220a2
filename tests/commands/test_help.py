"""What `--help` of each verb shows: a paragraph, grouped options with units and defaults, examples that parse."""

import argparse
import re
import shlex

import pytest

from blt_titan.commands.cli import VERBS
from tests.helpers.verbs import module_of

FEW_OPTIONS = 5
"""More than these are grouped."""
ONE_OF_SEVERAL = {"--prompt", "--batch", "--text", "--data"}
NEEDS_NO_DEFAULT = ONE_OF_SEVERAL | {"--png", "--json", "--out", "--entropy-out", "--checkpoint"}


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    """Arguments of the command's lines in its help, backslashes joined, comments and redirections cut off."""
    text = (parser.description or "").replace("\\\n", " ")
    program = parser.prog.replace("blt-titan", "blt[-_]titan")
    lines = re.findall(rf"^ +(?:torchrun .* -m )?{program} ?(.*)$", text, re.MULTILINE)
    found = []
    for line in lines:
        words = shlex.split(line.split("(on each")[0].replace("$RANK", "0"), comments=True)
        found.append(words[: next((i for i, word in enumerate(words) if word in "<>|"), None)])
    return found


@pytest.mark.parametrize("command", VERBS)
def test_options_are_grouped_and_each_says_what_it_takes(command):
    parser = module_of(command).make_parser()
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert len(options_of(parser)) <= FEW_OPTIONS or len(titles) >= 3
    loose = next(group for group in parser._action_groups if group.title in ("options", "optional arguments"))
    assert len(options_of(parser)) <= FEW_OPTIONS or [a.dest for a in loose._group_actions] == ["help"]
    for action in options_of(parser):
        name = action.option_strings[-1]
        assert action.help, name
        assert not re.match(r"(of|default|as) ", action.help), f"{name}: {action.help!r} says no noun"
        takes_value = action.nargs != 0 and not action.required
        assert not takes_value or name in NEEDS_NO_DEFAULT or "(default" in action.help, f"{name}: {action.help!r}"


@pytest.mark.parametrize("command", VERBS)
def test_help_begins_with_a_paragraph_and_an_example_that_parses(command):
    module = module_of(command)
    parser = module.make_parser()
    assert re.match(r"[A-Z][^\n]+[.:]\n", parser.description), parser.description
    assert examples(parser), "no example"
    for arguments in examples(parser):
        parser = module.make_parser()
        for action in parser._actions:
            if action.type is not None and not hasattr(action.type, "holds"):
                action.type = str  # paths and names of the example are not here
        parsed, overrides = parser.parse_known_args(arguments)
        assert parsed
        assert all(re.match(r"--[a-z0-9_]+\.[a-z0-9_.-]+=", word) for word in overrides), overrides
