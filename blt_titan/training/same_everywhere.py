"""All ranks train the same run: nodes are started one by one, and may be given other settings or other data.

Ranks with another learning rate, say, would train on without a word, each its own part of the weights by its own rule.
"""

import hashlib
import json
import socket
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from blt_titan.config.read import CONFIG_FILE_KEY, RunConfigError, settings_of
from blt_titan.config.run_config import RunConfig
from blt_titan.data.store.errors import DataError

_OF_A_NODE = (CONFIG_FILE_KEY, "training.dataset_path", "data.mixture")
"""Where a node finds things; that its data is the same is seen from the data."""
_MOST_SHOWN = 8


def check_same_settings(config: RunConfig) -> None:
    """Compare the settings of all ranks; collective.

    Raises:
        RunConfigError: on all ranks alike, a sentence for each key that differs, with who has what.
    """
    settings = {key: value for key, value in settings_of(config).items() if key not in _OF_A_NODE}
    sentences = [
        f"{key} differs among the ranks of this run: {who}; start all nodes with the same settings"
        for key, who in _differences(settings).items()
    ]
    if sentences:
        raise RunConfigError(*sentences)


def check_same_data(identity: Mapping[str, Any]) -> None:
    """Compare what all ranks read; collective.

    Args:
        identity: of the data, its order and its patches, as a checkpoint keeps it.

    Raises:
        DataError: on all ranks alike.
    """
    if differences := _differences(identity):
        name, who = next(iter(differences.items()))
        raise DataError(f"the ranks of this run read different data: {name} is {who}; copy it anew to all nodes")


def _differences(mine: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs among ranks, by key, and who has which value; empty if all have the same."""
    plain = {key: json.dumps(value, sort_keys=True, default=str) for key, value in mine.items()}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return {}
    # Seldom: only then do whole settings travel.
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), plain))
    found: dict[str, str] = {}
    for key in sorted({key for _, values in everyone for key in values}):
        first: dict[str, str] = {}
        for rank, (host, values) in enumerate(everyone):
            first.setdefault(values.get(key, "not there"), f"on rank {rank} ({host})")
        if len(first) > 1:
            found[key] = ", ".join(f"{value[:60]} {who}" for value, who in list(first.items())[:_MOST_SHOWN])
    return found
