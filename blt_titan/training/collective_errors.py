"""Which errors are those of ranks talking to each other, and so say that another rank is lost."""

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException


def is_of_a_collective(error: BaseException | None, depth: int = 8) -> bool:
    """Tell whether an error is one of collectives, or was caused by one; gloo's are plain RuntimeErrors."""
    if error is None or depth == 0:
        return False
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
        return True
    causes = [error.__cause__, error.__context__]
    if isinstance(error, CheckpointException):
        causes += [failure[0] for failure in error.failures.values()]
    return any(is_of_a_collective(cause, depth - 1) for cause in causes)
