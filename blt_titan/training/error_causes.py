"""What an error was caused by: ranks that cannot talk to each other, storage that does not answer."""

import errno
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

_MAY_PASS = frozenset(
    (
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.ENOLINK),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
    )
)
"""Numbers of faults that may pass: a mount that is away, a server that does not answer."""
_DEPTH = 8


class StorageLostError(RuntimeError):
    """Storage failed amid a run in a way that may pass, so that another try may go well."""


def is_of_a_collective(error: BaseException) -> bool:
    """Tell whether an error is one of collectives, or was caused by one; gloo's are plain RuntimeErrors.

    It says that another rank is lost.
    """
    return any(
        isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and "gloo/" in str(cause))
        for cause in _causes(error)
    )


def lost_storage(error: BaseException) -> StorageLostError | None:
    """Return what ends a run instead of an error that storage has caused in a way that may pass; None if none has."""
    passes = any(isinstance(cause, OSError) and cause.errno in _MAY_PASS for cause in _causes(error))
    return StorageLostError(str(error)) if passes else None


def _causes(error: BaseException | None, depth: int = _DEPTH) -> Iterator[BaseException]:
    """Yield an error and what it came from, also on other ranks."""
    if error is None or depth == 0:
        return
    yield error
    causes = [error.__cause__, error.__context__]
    if isinstance(error, CheckpointException):
        causes += [failure[0] for failure in error.failures.values()]
    for cause in causes:
        yield from _causes(cause, depth - 1)
