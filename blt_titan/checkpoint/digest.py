"""The digest of a model's weights: the same for a model in memory, in a checkpoint and in a model directory."""

import hashlib
from collections.abc import Iterable, Mapping

import torch


def weights_digest(tensors: Mapping[str, Iterable[torch.Tensor]]) -> str:
    """Return the SHA-256 of named tensors, of any dtype, as fp32 numbers.

    By name, ascending: the name in UTF-8, then the numbers row by row, little-endian.

    Args:
        tensors: each as blocks of its rows, in order; a tensor that is in memory is one block.

    >>> whole, halves = torch.ones(2, 3), [torch.ones(1, 3), torch.ones(1, 3)]
    >>> weights_digest({"w": [whole]}) == weights_digest({"w": halves})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for block in tensors[name]:
            digest.update(block.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
