"""How entropies are rounded before they decide where patches begin: as sidecars store them.

What is trained on is cut by stored entropies, so whatever cuts a text like that rounds alike: scoring while training,
generation, evaluation.
"""

from typing import Literal

import numpy as np

Storage = Literal["float16", "uint8"]

_LOWEST_NATS, _HIGHEST_NATS = 2.0**-10, 6.0
UINT8_EDGES_NATS = np.geomspace(_LOWEST_NATS, _HIGHEST_NATS, 255).astype(np.float32)
"""Where one code ends and the next begins, fp32 [255], 3.5 % apart: code c holds edge[c - 1] < H <= edge[c]."""
_UINT8_VALUES = np.concatenate([[0.0], np.sqrt(UINT8_EDGES_NATS[:-1] * UINT8_EDGES_NATS[1:]), [_HIGHEST_NATS * 1.01]])


def to_storage(entropies_nats: np.ndarray, storage: Storage) -> np.ndarray:
    """Round entropies [N] to what is stored: float16, or uint8 codes on a log scale.

    >>> to_storage(np.array([0.0, 1.3, 99.0]), "uint8").tolist()
    [0, 210, 255]
    """
    if storage == "float16":
        return entropies_nats.astype(np.float16)
    return np.searchsorted(UINT8_EDGES_NATS, entropies_nats.astype(np.float32), side="left").astype(np.uint8)


def from_storage(stored: np.ndarray) -> np.ndarray:
    """Return the entropies that decide, fp32 [N]; of a uint8 code the value amid its edges.

    >>> from_storage(to_storage(np.array([0.0, 1.3]), "uint8")).round(3).tolist()
    [0.0, 1.29]
    """
    return stored.astype(np.float32) if stored.dtype == np.float16 else _UINT8_VALUES.astype(np.float32)[stored]


def decision_edge(threshold_nats: float, storage: Storage = "float16") -> tuple[float, float]:
    """Return between which two values a comparison with and without rounding may decide otherwise.

    >>> decision_edge(1.0)  # rounded, what is up to half a float16 step above 1 is not above it
    (1.0, 1.00048828125)
    """
    if storage == "uint8":
        above = np.searchsorted(_UINT8_VALUES.astype(np.float32), np.float32(threshold_nats), side="right")
        if above == 0:
            return threshold_nats, threshold_nats
        edge = float(UINT8_EDGES_NATS[above - 1]) if above <= len(UINT8_EDGES_NATS) else float("inf")
        return min(threshold_nats, edge), max(threshold_nats, edge)
    below = np.float16(threshold_nats)
    if float(below) > threshold_nats:
        below = np.nextafter(below, np.float16(-np.inf))
    above = np.nextafter(below, np.float16(np.inf))
    middle = (float(below) + float(above)) / 2
    return min(threshold_nats, middle), max(threshold_nats, middle)
