"""Files here and wherever an fsspec URL says: opening them, and sentences for what goes wrong."""

import os
import re
from typing import Any

from blt_titan.data.store.address import file_system, is_remote
from blt_titan.data.store.errors import DataError

_QUERY = re.compile(r"\?[^/?]+=[^/?]*$")


def open_binary(path: str) -> Any:
    """Open a file for reading, here or wherever its URL says."""
    if not is_remote(path):
        return open(path, "rb")
    fs, inner = file_system(path)
    return fs.open(inner, "rb")


def local_name(name: str) -> str:
    """Return the path that a URL of this machine's own files stands for; any other name as it is."""
    return file_system(name)[1] if name.startswith(("file://", "local://")) else name


def without_query(path: str) -> str:
    """Return a name without the query of a URL, which downloads often leave in it.

    >>> without_query("crawl/a.jsonl?download=true"), without_query("crawl/why?.txt")
    ('crawl/a.jsonl', 'crawl/why?.txt')
    """
    return _QUERY.sub("", path)


def cannot_read(path: str, error: OSError) -> DataError:
    """Say in a sentence that a file cannot be read."""
    return DataError(
        f"{printable(path)}: cannot be read ({error.strerror or error}); check the path and its permissions"
    )


def cannot_open(name: str, error: Exception) -> DataError:
    """Say in a sentence what a driver or the hub said."""
    reason = " ".join(str(error).split())
    return DataError(f"{name}: cannot be opened ({type(error).__name__}: {reason}); check the name and the network")


def printable(name: str) -> str:
    """Give a file name as valid Unicode: a byte that is not UTF-8 becomes a backslash escape."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
