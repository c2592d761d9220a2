"""What the bytes of a checkpoint were when they were written, so that a flipped bit is found when they are read.

    __0_0.distcp   [entry][entry][entry]   back to back; the metadata has a digest of each
    .metadata      [pickle][seal]          the seal is the digest of the pickle, after the end that unpicklers stop at

Every byte of every file is in one digest, and a checkpoint has them all once it has a `.metadata`. The decision that is
not obvious: a digest is of an entry, not of a file, because an entry is what a rank reads, whatever the layout; and it
is an attribute of what says where the entry lies, so that torch's own reader loads such a checkpoint too. XXH3 finds
what fails, not who forges; it takes 1/10 of the time of SHA-256.
"""

import io
from collections.abc import Callable
from typing import Any

import xxhash

_ATTRIBUTE = "xxh3_128"
_MARK = b"\nxxh3_128 "
DIGEST_BYTES = 16
_SEAL_BYTES = len(_MARK) + 2 * DIGEST_BYTES + 1
_BLOCK_BYTES = 16 * 2**20

new_digest = xxhash.xxh3_128


def recorded(place: Any) -> bytes | None:
    """Return the digest of an entry; None if it was written without.

    Args:
        place: where it lies, a `_StorageInfo` of torch's.
    """
    return vars(place).get(_ATTRIBUTE)


def record(place: Any, digest: bytes) -> None:
    """Keep the digest of an entry; pickled with its place."""
    setattr(place, _ATTRIBUTE, digest)


def seal(content: bytes) -> bytes:
    """Return the content of a `.metadata` with its seal.

    >>> unsealed(seal(b"a pickle."))
    (b'a pickle.', True)
    >>> unsealed(b"one of old.")
    (b'one of old.', False)
    """
    return content + _MARK + new_digest(content).hexdigest().encode() + b"\n"


def unsealed(content: bytes) -> tuple[bytes, bool]:
    """Return the content of a `.metadata` without its seal, and whether there was one.

    Raises:
        ValueError: the seal is of another content.
    """
    if not content[-_SEAL_BYTES:].startswith(_MARK):
        return content, False
    inner = content[:-_SEAL_BYTES]
    if seal(inner) != content:
        raise ValueError("it is not what was written, its digest differs")
    return inner, True


def digest_of_range(file: io.BufferedIOBase, offset: int, length: int, on_bytes: Callable[[int], Any]) -> bytes:
    """Return the digest of a range of a file, or of what there is of it, a block at a time.

    Args:
        file: to read in.
        offset: of its first byte.
        length: in bytes.
        on_bytes: told how many bytes were read, as they are.
    """
    digest = new_digest()
    file.seek(offset)
    while length and (block := file.read(min(length, _BLOCK_BYTES))):
        digest.update(block)
        on_bytes(len(block))
        length -= len(block)
    return digest.digest()
