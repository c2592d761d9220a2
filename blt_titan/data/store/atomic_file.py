"""Write a file in one step: it is there whole, or not at all."""

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, content: bytes, *, temporary: Path | None = None) -> None:
    """Write under another name beside `path`, then rename; what `path` held is replaced.

    Args:
        path: the file.
        content: what it shall hold.
        temporary: the other name, where only one process writes, so that a killed one leaves nothing unknown. Else one
            that no other process has, on whatever machine.
    """
    temporary = temporary or path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
