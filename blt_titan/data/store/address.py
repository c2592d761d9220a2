"""Where the files of a data set lie: a path of this machine, or an address of a file system that fsspec reaches.

An `Address` does for URLs what `Path` does here: it names, joins and is shown, and cannot be opened by mistake. `Path`
itself would make `s3:/bucket` of `s3://bucket`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.core

from blt_titan.data.store.errors import DataError


@dataclass(frozen=True)
class Address:
    """A URL of a file or a folder, without a slash at its end.

    >>> folder = Address("s3://bucket/web")
    >>> str(folder / "manifest.json"), (folder / "manifest.json").name, (folder / "manifest.json").parent == folder
    ('s3://bucket/web/manifest.json', 'manifest.json', True)
    """

    url: str

    def __post_init__(self):
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Address":
        return Address(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Address":
        """The folder that it lies in."""
        return Address(self.url.rpartition("/")[0])


Place = Path | Address


def place_of(name: str | os.PathLike[str] | Address) -> Place:
    """Return what a user's path or URL names."""
    if isinstance(name, Address):
        return name
    return Address(os.fspath(name)) if is_remote(os.fspath(name)) else Path(name)


def is_remote(name: str) -> bool:
    """Tell whether a name is a URL of an fsspec file system, as in s3://bucket/folder."""
    return "://" in name


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it; `options` are those of its driver.

    Raises:
        DataError: its driver is unknown or not installed.
    """
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        how = "; install it with: pip install 'blt_titan[s3]'" if url.startswith(("s3://", "s3a://")) else ""
        raise DataError(f"{url}: {error}{how}") from error
