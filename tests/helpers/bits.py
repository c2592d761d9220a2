"""One bit of a file, flipped for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flip(file: Path, offset: int) -> Iterator[None]:
    """Flip a bit of the byte at `offset`, another one for each offset, and put it back."""
    content = file.read_bytes()
    file.write_bytes(content[:offset] + bytes([content[offset] ^ 1 << offset % 8]) + content[offset + 1 :])
    try:
        yield
    finally:
        file.write_bytes(content)
