"""A record batch of a sidecar: the entropies of one record batch of text."""

import zlib
from typing import Any

import numpy as np
import pyarrow as pa

from blt_titan.data.store.arrow_file import record_batch_buffers
from blt_titan.patching.rounding import Storage, from_storage


def parse_entropies(message: Any, values: int, storage: Storage, crc32: int) -> np.ndarray:
    """Check a record batch's message and return what it holds: fp32 [values]; ValueError if it is not sound."""
    if zlib.crc32(message) != crc32:
        raise ValueError("does not match its crc32")
    rows, [stored] = record_batch_buffers(message, (2,))
    dtype = np.dtype(storage)
    if rows != values or stored.nbytes < rows * dtype.itemsize:
        raise ValueError(f"holds {rows} entropies in {stored.nbytes} bytes, expected {values} of {storage}")
    entropies_nats = from_storage(stored[: rows * dtype.itemsize].view(dtype))
    check_entropies(entropies_nats)
    return entropies_nats


def check_entropies(entropies_nats: np.ndarray) -> None:
    """Raise ValueError unless entropies are finite and not negative."""
    # NaN is the least and the greatest of values among which it is, and no comparison with it holds.
    if not (entropies_nats.min(initial=0) >= 0 and entropies_nats.max(initial=0) < np.inf):
        raise ValueError("entropies must be finite and not negative")


def entropies_schema(storage: Storage) -> pa.Schema:
    """Return the schema of a file of entropies."""
    return pa.schema([("entropies_nats", pa.float16() if storage == "float16" else pa.uint8())])
