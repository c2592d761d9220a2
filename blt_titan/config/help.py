"""Every key of a run's settings with its type, default, bounds and meaning: what a user looks up.

The meaning of a key is the text under its field: in `job_config.py` where that has the field, else torchtitan's.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from blt_titan.config.read import describe_type, run_config_class, settings_of
from blt_titan.config.rules.bounds import Rule
from blt_titan.config.rules.keys import rules
from blt_titan.job_config import JobConfig
from blt_titan.titan import JobConfig as TitanJobConfig


class Setting(NamedTuple):
    """What there is to say of a key."""

    key: str
    type: str
    """In words."""
    default: Any
    rule: Rule
    meaning: str
    """In one line."""
    is_ours: bool
    """Whether the meaning is of this project and not torchtitan's."""


def settings_help() -> list[Setting]:
    """Return all keys, in the order of the sections."""
    types = dict(_types(run_config_class(), ""))
    theirs, ours = dict(_meanings(TitanJobConfig, "")), dict(_meanings(JobConfig, ""))
    return [
        Setting(key, types[key], default, rules()[key], ours.get(key) or theirs[key], key in ours)
        for key, default in settings_of(run_config_class()()).items()
    ]


def listing() -> str:
    """Return all keys as text, each with its meaning below it; of those that are refused, the reason."""
    return "\n".join(_entry(setting) for setting in settings_help())


def _entry(setting: Setting) -> str:
    if setting.rule.is_refused:
        return f"{setting.key}  refused: {setting.rule.allowed}\n"
    head = f"{setting.key}  {setting.type}, default {shown_default(setting.default)}"
    bounds = allowed(setting)
    return "\n".join(
        [
            f"{head}; {bounds}" if bounds else head,
            *textwrap.wrap(setting.meaning, 100, initial_indent="    ", subsequent_indent="    "),
            "",
        ]
    )


def allowed(setting: Setting) -> str:
    """Return the bounds of a key in words; nothing where its type says all."""
    return "" if setting.rule.allowed == "anything of its type" else setting.rule.allowed


def shown_default(value: Any) -> str:
    """Return a default as TOML writes it; `unset` where there is none.

    >>> [shown_default(value) for value in (None, True, "blt", 0.5, ["model"])]
    ['unset', 'true', '"blt"', '0.5', '["model"]']
    """
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).replace("'", '"')


def _types(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _types(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", describe_type(hint)


def _meanings(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _meanings(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _texts_under_fields(cls).get(name, "")


@cache
def _texts_under_fields(cls: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, on one line."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str() as text)):
                    found[field.target.id] = " ".join(text.split())
    return found
