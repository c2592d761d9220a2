"""Figures as JSON takes them, which knows no infinity."""

import math
from typing import Any


def finite_or_none(value: Any) -> Any:
    """Return the same with None for each number that is not finite.

    >>> finite_or_none({"days": math.inf, "steps": [1, 2.5]})
    {'days': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: finite_or_none(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
