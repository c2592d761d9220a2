"""Names that become part of a path: of sidecars, and of files that a manifest names."""

import re

from blt_titan.data.store.errors import DataError

MOST_CHARACTERS = 100
_PLAIN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MOST_CHARACTERS - 1}}}")


def is_plain(value: object) -> bool:
    """Tell whether `plain_name` takes it."""
    return isinstance(value, str) and _PLAIN.fullmatch(value) is not None


def plain_name(value: object) -> str:
    """Return a name that, joined to a folder, names something in that folder and nowhere else.

    >>> plain_name("entropy_100m-v1.2")
    'entropy_100m-v1.2'

    Raises:
        DataError: it is another; says what a name may be.
    """
    if not isinstance(value, str) or not is_plain(value):
        raise DataError(
            f"{value!r}: must be a plain name: letters a to z, digits, '.', '_' and '-', first a letter or a digit, at "
            f"most {MOST_CHARACTERS} of them"
        )
    return value
