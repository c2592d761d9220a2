"""Objects that run something when they are unpickled."""

from pathlib import Path
from typing import Any

import numpy as np


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


class Calls:
    """Calls something with arguments when it is unpickled, and gives the result a state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.how = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.how


def pointers() -> dict[str, Any]:
    """Return arrays that would have NumPy take bytes of the file for pointers, by how; to be pickled."""
    of_objects = Calls(np.dtype, "O")
    turned = Calls(np.dtype, "i8", False, True, state=(3, "<", None, None, None, -1, -1, 63))
    reconstruct = np.zeros(0).__reduce__()[0]
    return {
        "object array over bytes": Calls(np.ndarray, (1,), of_objects, b"A" * 8),
        "used as a shape": Calls(np.ndarray, Calls(np.ndarray, (1,), of_objects, b"A" * 8)),
        "a dtype turned to objects": Calls(
            reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), turned, False, b"A" * 8)
        ),
        "a state of objects": Calls(reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), of_objects, False, [1])),
        "memory without bytes": Calls(np.ndarray, (2**40,)),
        "more than there is": Calls(
            reconstruct, np.ndarray, (0,), b"b", state=(1, (2**40,), np.dtype("i8"), False, b"A" * 8)
        ),
    }
