"""What context-parallel attention keeps for backward."""

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh

from blt_titan.model.attention import attend, causal_mask
from parallelisms.context import GatheredAttention
from tests.helpers.distributed import run_distributed
from tests.helpers.saved_memory import saved_bytes

pytestmark = pytest.mark.slow


def saved_and_gradients(keep: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes saved by the attention of one half of a row, with or without keeping what was gathered."""
    S, H, K = 64, 2, 16
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    begin = mesh.get_local_rank() * S
    generator = torch.Generator().manual_seed(begin)
    qkv = [torch.randn(1, S, H, K, generator=generator).requires_grad_() for _ in range(3)]
    mask = causal_mask(torch.zeros(1, 2 * S, dtype=torch.int32), queries=range(begin, begin + S))
    attention = GatheredAttention(attend, mesh)
    with saved_bytes(nn.Module()) as saved:
        out = attention._attend(*qkv, mask) if keep else attention(*qkv, mask)
    out.sin().sum().backward()
    gradients = [x.grad for x in qkv if x.grad is not None]
    assert len(gradients) == 3
    return saved.total, gradients


def both() -> list[tuple[int, list[torch.Tensor]]]:
    return [saved_and_gradients(keep) for keep in (False, True)]


def test_gathered_keys_and_values_are_not_kept():
    for (without, gradients), (kept, expected) in run_distributed(both, 2):
        own = 3 * 64 * 2 * 16 * 4  # queries, keys and values of the rank, fp32
        gathered = 2 * 128 * 2 * 16 * 4  # keys and values of the row
        assert without <= own + 2 * 64 * 128, f"{without} bytes: more than the rank's own and the mask"
        assert kept >= without + gathered // 2, "the comparison would not show it"
        for gradient, reference in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, reference)
