"""The reference of settings as Markdown: `python -m blt_titan.config.reference > docs/settings.md`.

Our sections whole; of torchtitan's keys those that have bounds, a meaning or a default of their own here, and those
that are refused.
"""

import sys
from collections.abc import Iterable
from itertools import groupby
from typing import get_type_hints

from blt_titan.config.help import Setting, allowed, settings_help, shown_default
from blt_titan.job_config import JobConfig
from blt_titan.titan import JobConfig as TitanJobConfig

_BEGINNING = """<!-- python -m blt_titan.config.reference > docs/settings.md -->
# Settings

A run is a TOML of sections. `blt-titan config debug` prints the effective settings of one, and
`blt-titan config --keys` lists every key with what it means, torchtitan's own included. Any key can be overridden after
the configuration, as in `blt-titan train my.toml --training.steps=100`. An unknown key, or a value that is not allowed,
is an error before anything starts; all faults are shown at once.
"""


def reference() -> str:
    """Return the reference as Markdown."""
    settings = settings_help()
    theirs = [setting for setting in settings if _section(setting) in get_type_hints(TitanJobConfig)]
    parts = [_BEGINNING, "## Sections of BLT\n"]
    for section, group in groupby((setting for setting in settings if setting not in theirs), _section):
        parts += [f"### `[{section}]`\n", f"{get_type_hints(JobConfig)[section].__doc__}\n", _full_table(group)]
    parts += [
        "## torchtitan's keys\n",
        "With the bounds they have here; a key that is not listed may be anything of its type. Some mean something "
        "else than in torchtitan: [training](training.md#torchtitans-keys-that-mean-something-else-here).\n",
        _short_table(s for s in theirs if not s.rule.is_refused and (s.is_ours or allowed(s))),
        "### Refused\n",
        "These have no effect here, so that any value but the default is refused.\n",
        _table(("key", "why"), ((_code(s.key), s.rule.allowed) for s in theirs if s.rule.is_refused)),
    ]
    return "\n".join(parts)


def _section(setting: Setting) -> str:
    return setting.key.split(".")[0]


def _full_table(settings: Iterable[Setting]) -> str:
    return _table(
        ("key", "type", "default", "bounds", "meaning"),
        ((_code(s.key), s.type, _code(shown_default(s.default)), allowed(s), s.meaning) for s in settings),
    )


def _short_table(settings: Iterable[Setting]) -> str:
    return _table(
        ("key", "type", "default", "bounds", "here"),
        (
            (_code(s.key), s.type, _code(shown_default(s.default)), allowed(s), s.meaning if s.is_ours else "")
            for s in settings
        ),
    )


def _code(text: str) -> str:
    return f"`{text}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in line)} |\n" for line in lines
    )


if __name__ == "__main__":
    sys.stdout.write(reference())
