"""Modules of users, imported by name so that they register what settings then name: patching rules, schedules, ..."""

import importlib
import sys


class CustomImportError(ValueError):
    """A module of a user's that cannot be imported; the message says which, and why."""


def import_custom(name: str) -> None:
    """Import a module by its dotted name; the working directory is looked in too, as `python -m` does.

    Raises:
        CustomImportError: whatever it raises.
    """
    if "" not in sys.path:
        sys.path.append("")
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a module of the user's raises
        raise CustomImportError(f"{name!r}: cannot be imported ({type(error).__name__}: {error})") from error
