"""Faults of storage that may pass: a mount that is away, a server that does not answer."""

import errno

from torch.distributed.checkpoint.api import CheckpointException

_MAY_PASS = frozenset(
    (
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.ENOLINK),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
    )
)


class StorageLostError(RuntimeError):
    """Storage failed amid a run in a way that may pass, so that another try may go well."""


def lost_storage(error: BaseException) -> StorageLostError | None:
    """Return what ends a run instead of an error which such a fault has caused; None if none has."""
    return StorageLostError(str(error)) if _may_pass(error) else None


def _may_pass(error: BaseException | None, depth: int = 8) -> bool:
    if error is None or depth == 0:
        return False
    if isinstance(error, OSError) and error.errno in _MAY_PASS:
        return True
    causes = [error.__cause__, error.__context__]
    if isinstance(error, CheckpointException):
        causes += [failure[0] for failure in error.failures.values()]
    return any(_may_pass(cause, depth - 1) for cause in causes)
