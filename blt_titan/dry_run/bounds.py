"""What dry runs are held to: spills that are allowed by name, and the most memory of the shipped configurations.

Both stand in `bounds.toml` beside this module, with how they were had.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

BOUNDS = Path(__file__).with_name("bounds.toml")


@dataclass(frozen=True)
class AllowedSpill:
    """A kernel that may keep registers in memory, for a reason."""

    kernel: str
    """Name as Inductor gives it; `*` stands for anything."""
    most_bytes: int
    """Bytes of a thread's stack."""
    reason: str


@dataclass(frozen=True)
class MemoryBound:
    """The most that one layout of a configuration may hold."""

    config: str
    world_size: int
    most_gib: float
    overrides: tuple[str, ...] = ()
    kernels: bool = False
    """Generate and assemble the kernels too, which takes minutes."""


def allowed_spills() -> list[AllowedSpill]:
    """Return the exceptions, in the order of the file."""
    return [AllowedSpill(**entry) for entry in _read().get("spill", [])]


def memory_bounds() -> list[MemoryBound]:
    """Return the layouts that `make check-cuda` runs."""
    entries = _read().get("memory", [])
    return [MemoryBound(**{**entry, "overrides": tuple(entry.get("overrides", ()))}) for entry in entries]


def _read() -> dict[str, list[dict]]:
    return tomllib.loads(BOUNDS.read_text(encoding="utf-8"))
