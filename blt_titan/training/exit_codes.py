"""How ranks, and `blt-titan train`, end; docs/training.md says what a scheduler should do then."""

from blt_titan.training.preemption import EXIT_CODE as LEFT

__all__ = ["CAME_OUT_WRONG", "LEFT", "REFUSED"]

REFUSED = 2
"""Settings or data are at fault; a sentence says which."""
CAME_OUT_WRONG = 3
"""The work itself went wrong, as it would again: not finite, for instance."""
