"""What a run computes on: this machine, or another that its settings are checked for."""

from dataclasses import dataclass

from blt_titan.titan import device_type, has_cuda_capability


@dataclass(frozen=True)
class Target:
    """The devices of a run."""

    device_type: str
    """"cuda" or "cpu"."""
    multiplies_float8: bool
    """Compute capability of 8.9 or later."""


CARD = Target("cuda", multiplies_float8=True)
"""Any GPU of `dry_run.cards`."""
CPU = Target("cpu", multiplies_float8=False)


def this_machine() -> Target:
    """Return what a run here would compute on."""
    return Target(device_type, has_cuda_capability(8, 9))
