"""Write a file in one step: it is there whole, or not at all."""

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a name of its own beside `path`, then rename; what `path` held is replaced."""
    # Not the process's number: several machines may write to one directory.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
