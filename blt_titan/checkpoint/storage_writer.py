"""Write a checkpoint's files with digests (`digests.py`), computed from the bytes on their way to the file."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _FileSystemWriter,
    _StorageWriterTransforms,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from blt_titan.checkpoint.digests import new_digest, record, seal
from blt_titan.checkpoint.steps import METADATA
from blt_titan.data.store.atomic_file import write_atomically


class DigestWriter(_FileSystemWriter):
    """Writes a rank's entries, each with its digest; rank 0 writes the metadata, whole or not at all, when all have.

    Not torch's public `FileSystemWriter`, which is that and a stager: torch would then stage with it.

    Args:
        path: the folder `step-N`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.transforms = _EntryDigests()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's entries.

        Raises:
            OSError: naming the folder, where the operating system refused, whatever became of that on its way here.
        """
        try:
            written = super().write_data(plan, planner)
        except Exception as error:
            if (cause := _os_error(error)) is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(self.path)) from error
        for result in written.value():
            record(result.storage_data, self.transforms.of.pop(result.index).digest())
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, which makes the checkpoint complete."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
        metadata.storage_meta = self.storage_meta()
        path = Path(self.path) / METADATA
        write_atomically(path, seal(pickle.dumps(metadata)), temporary=path.with_name(f"{METADATA}.tmp"))


class _EntryDigests(_StorageWriterTransforms):
    """Hands out a stream for each entry that changes nothing, and keeps the digest of what passed."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[MetadataIndex, Any] = {}

    def transform_save_stream(self, write_item: WriteItem, raw_stream: io.IOBase) -> tuple[Any, list[str]]:
        stream = _DigestedStream(raw_stream)
        self.of[write_item.index] = stream.digest
        return stream, []


class _DigestedStream(io.RawIOBase):
    def __init__(self, stream: Any):
        self._stream = stream
        self.digest = new_digest()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self._stream.write(content)

    def close(self) -> None:
        """Leave the file open: the next entry follows."""
        if not self.closed:
            self._stream.flush()
        super().close()


def _os_error(error: BaseException | None) -> OSError | None:
    """Find what the operating system said: torch's archives raise errors of their own while one is handled."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error
