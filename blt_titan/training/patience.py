"""How long whoever waits in a run does wait, so that what fails is found before those who wait for it give up.

what                                                     with several ranks, and comm.train_timeout_seconds = 100
a collective gives up, and names the rank that waits     100 s
ranks look at each other, and name the one that is late   90 s: heartbeat.limit_seconds
a rank has asked a store in vain, and ends with its word  60 s: data.fetch_timeout_s
a loader worker shows no sign of life, and begins anew    40 s: data.wait_seconds, for which there is time twice
"""

from blt_titan.data.rows.loader import WAIT_S
from blt_titan.data.store.object_store import Fetching
from blt_titan.job_config import Data, Heartbeat
from blt_titan.titan import Comm

FETCH_SHARE, WORKER_SHARE = 2 / 3, 0.4


def default_limit_s(timeout_s: float) -> float:
    """Return how long ranks may wait, so that they are named before a collective gives up after `timeout_s`.

    >>> default_limit_s(100)
    90.0
    >>> default_limit_s(12)
    6.0
    """
    return max(timeout_s / 2, timeout_s - max(10.0, timeout_s / 10))


def others_wait_s(heartbeat: Heartbeat, comm: Comm, world_size: int) -> float | None:
    """Return how long a rank may stand in a step until the run is ended for it; None: for ever."""
    if heartbeat.limit_seconds is not None:
        return heartbeat.limit_seconds
    return default_limit_s(comm.train_timeout_seconds) if world_size > 1 else None


def fetch_timeout_s(data: Data, heartbeat: Heartbeat, comm: Comm, world_size: int) -> float:
    """Return how long a rank asks an object store."""
    if data.fetch_timeout_s is not None:
        return data.fetch_timeout_s
    others = others_wait_s(heartbeat, comm, world_size)
    return Fetching.timeout_s if others is None else min(Fetching.timeout_s, FETCH_SHARE * others)


def worker_wait_s(data: Data, comm: Comm, world_size: int) -> float:
    """Return how long a loader worker may show no sign of life."""
    if data.wait_seconds is not None:
        return data.wait_seconds
    return WAIT_S if world_size == 1 else min(WAIT_S, WORKER_SHARE * comm.train_timeout_seconds)
