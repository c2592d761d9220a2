"""Modules of users, imported by name so that they register what settings then name: patching rules, schedules, ..."""

import importlib
import os
import sys


class CustomImportError(ValueError):
    """A module of a user's that cannot be imported; the message says which, and why."""


def import_custom(name: str) -> None:
    """Import a module by its dotted name; the working directory is looked in first, as `python -m` does.

    Raises:
        CustomImportError: whatever it raises.
    """
    # First, as for ranks, which are started by `python -m`: parent and ranks import the same module.
    if os.getcwd() not in (os.path.abspath(entry) for entry in sys.path[:1]):
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a module of the user's raises
        raise CustomImportError(f"{name!r}: cannot be imported ({type(error).__name__}: {error})") from error
