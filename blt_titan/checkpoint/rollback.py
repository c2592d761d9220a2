"""Where the data of a checkpoint goes on once a run has gone back to it: `step-N/rollback.json`.

A rollback gives up steps, and does not read their rows again: one of them caused a spike. So the weights of `step-N` go
on with rows that lie further on than the checkpoint itself says. The file says so beside it, in one write, and a run
that loads `step-N` later does as the run that went back did. Without the file all rows after `step-N` are read.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blt_titan.checkpoint.json_fields import Field, FieldError, read_fields, read_object, whole
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.data.store.atomic_file import write_atomically

NAME = "rollback.json"
_MOST = 2**62


@dataclass(frozen=True)
class Rollback:
    """What the file says."""

    rows_served: int
    """Rows of the run, over all ranks, after which the data goes on."""
    positions: list[list[int]]
    """Where each stream is there, as `RowLoader.state_dict` has it."""
    rollbacks: int
    """How often the run had gone back, this time included."""

    def write(self, checkpoint: Path) -> None:
        """Write it beside a checkpoint `step-N`, in place of what an earlier rollback wrote.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = checkpoint / NAME
        try:
            write_atomically(path, json.dumps(asdict(self)).encode())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror}); make room there") from error


def read_rollback(checkpoint: Path) -> Rollback | None:
    """Return what is written beside a checkpoint `step-N`; None if no run went back to it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint / NAME
    try:
        return Rollback(**read_fields(read_object(path), _TABLE, f"{path}: "))
    except FileNotFoundError:
        return None
    except (OSError, FieldError) as error:
        said = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: says where the data goes on after a rollback, and cannot be read ({said}); restore it, or remove "
            "it to read all rows after this step"
        ) from error


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(value[0]) and all(type(n) is int and 0 <= n < _MOST for n in row)
        for row in value
    )


_TABLE = {
    "rows_served": whole(0, _MOST),
    "positions": Field(_is_table, "a table of whole numbers"),
    "rollbacks": whole(1, _MOST),
}
