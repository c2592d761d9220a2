"""Bounds that one key of the settings can have, each with the words in which a message states them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from blt_titan.data.store.names import is_plain
from blt_titan.patching.rule import built_in_names, is_registered

MAX_SEED = 2**63 - 1
_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """What one key may be.

    Attributes:
        allows: tells whether a value of the right type is allowed.
        allowed: the same in words, after "must be" or, where the key is refused, the reason.
        is_refused: nothing but the default is allowed.
    """

    allows: Callable[[Any], bool]
    allowed: str
    is_refused: bool = False


ANY = Rule(lambda value: True, "anything of its type")
"""Booleans, choices that the type already bounds, free text."""
TEXT = Rule(lambda value: _is_unicode(value) and "\0" not in value, "text of UTF-8 without NUL characters")


def whole(low: int, high: int = _MAX_COUNT, *, or_value: int | None = None, why: str = "") -> Rule:
    """Return the rule of a whole number from `low` to `high`; None passes, where the type allows it."""
    also = f", or {or_value}{why}" if or_value is not None else why
    return Rule(lambda v: v is None or low <= v <= high or v == or_value, f"at least {low} and at most {high}{also}")


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False, inf: bool = False) -> Rule:
    """Return the rule of a number from `low` to `high`, `above` and `below` leaving out the ends; never NaN."""

    def allows(value: float | None) -> bool:
        if value is None:
            return True
        try:
            value = float(value)
        except OverflowError:
            return False
        fits = (value > low if above else value >= low) and (value < high if below else value <= high)
        return fits and (inf or math.isfinite(value))

    what = "a number" if inf else "a finite number"
    said = [f"above {low:g}" if above else f"at least {low:g}"] if low > -math.inf else []
    said += [f"below {high:g}" if below else f"at most {high:g}"] if high < math.inf else []
    return Rule(allows, f"{what} {' and '.join(said)}".strip())


def one_of(*values: Any) -> Rule:
    """Return the rule of a choice."""
    return Rule(lambda value: value in values, f"one of {', '.join(map(repr, values))}")


def some_of(*values: str) -> Rule:
    """Return the rule of a list whose items are a choice."""
    return Rule(lambda value: set(value) <= set(values), f"a list of some of {', '.join(map(repr, values))}")


def unused(why: str) -> Rule:
    """Return the rule of a key that has no effect here: any value but the default is refused."""
    return Rule(lambda value: False, why, is_refused=True)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as a name that is not UTF-8 has
        return False
    return True


def _is_path(value: str) -> bool:
    return (
        _is_unicode(value)
        and value != ""
        and "\0" not in value
        and len(value.encode()) < 4096
        and max(len(part.encode()) for part in value.split("/")) < 256
    )


def _is_inside(value: str) -> bool:
    path = PurePosixPath(value)
    inside = _is_path(value) and bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and path.parts[0] not in _RESERVED


_RESERVED = (
    *("config.toml", "run.lock", "metrics.jsonl", "quarantined.jsonl", "skipped.jsonl", "status.json", "ended.json"),
    "hf",
)
FOLDER = Rule(_is_inside, f"a path inside job.dump_folder, without '..', and not {', '.join(_RESERVED)}")
FILE = Rule(lambda v: v is None or _is_inside(v), FOLDER.allowed)
PLAIN_NAME = Rule(is_plain, "a plain name: letters, digits, '.', '_' and '-', first a letter or a digit")
PATCH_RULE = Rule(
    is_registered,
    f"one of {', '.join(map(repr, built_in_names()))}, or a rule that the module experimental.custom_import registers",
)
TIMES = Rule(lambda v: v == 0 or 1 < v < math.inf, "0, or a finite number above 1")
PATH = Rule(lambda v: v is None or _is_path(v), "a path: not empty, and of names that a file system takes")


PROM_FILE = Rule(
    lambda v: v is None or (_is_path(v) and len(PurePosixPath(v).name) > len(".prom") and v.endswith(".prom")),
    "a path that ends in .prom, as node exporter reads no others",
)


def _is_url(value: str) -> bool:
    if not value.isascii() or not value.isprintable() or " " in value:
        return False
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


URL = Rule(lambda v: v is None or _is_url(v), "a URL that begins with http:// or https://")


def _is_ac_option(value: str) -> bool:
    return value == "op" or (value.isascii() and value.isdigit() and int(value[:10]) >= 1)


def _is_backend(value: str) -> bool:
    from torch._dynamo import list_backends

    return value in list_backends(exclude_tags=())


AC_OPTION = Rule(_is_ac_option, "'op', or a whole number of at least 1 as text: every nth block")
BACKEND = Rule(_is_backend, "a backend of torch.compile, as torch._dynamo.list_backends(exclude_tags=()) names")


def shown(value: Any) -> str:
    """Return a value as messages show it: on one line, not too long, booleans as in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        said = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return said if len(said) <= 80 else f"{said[:77]}..."
