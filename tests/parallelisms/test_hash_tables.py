"""Hash tables by columns: what travels, by counting the bytes of each collective."""

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from blt_titan.model import initialization
from blt_titan.model.hash_embedding import HashEmbedding, look_up_whole
from parallelisms.hash_tables import local_columns, shard_columns
from parallelisms.weights import write_shard
from tests.helpers.distributed import run_distributed
from tests.helpers.sent_bytes import SentBytes

pytestmark = pytest.mark.slow

ROW_BYTES = 24_576
DIM = 1024
NGRAMS = (3, 4, 5, 6, 7, 8)
REAL_ROWS = 500_002
RANKS = 2


def traffic(sharding: str, n_rows: int) -> dict[str, int]:
    """Bytes that this rank sends for its part of one row, forward and backward, with bf16 outside the tables."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("bytes",))
    module: nn.Module = HashEmbedding(DIM, ngrams=NGRAMS, n_functions=1, n_rows=n_rows)
    nn.init.normal_(module.weight)
    if sharding == "columns":
        look_up = shard_columns(module, mesh, compute_dtype=torch.bfloat16)
    else:
        look_up = look_up_whole
        # Both dtypes bf16, in favour of FSDP: by default it sums gradients in fp32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    S = ROW_BYTES // RANKS
    ids = torch.randint(4, 260, (1, S), dtype=torch.int32)
    before = torch.zeros(1, 7, dtype=torch.int32)
    with SentBytes() as counter:
        out = module(ids, torch.zeros_like(ids), before, before, look_up)
        assert out.dtype == torch.bfloat16
        assert out.shape == (1, S, DIM)
        out.sum().backward()
    assert module.weight.grad is not None
    return counter.by_kind


def all_traffic() -> dict[tuple[str, int], dict[str, int]]:
    return {(sharding, n): traffic(sharding, n) for sharding in ("columns", "fsdp") for n in (1_001, 2_002)}


def test_columns_move_a_tenth_of_what_gathering_the_tables_moves():
    by_run = run_distributed(all_traffic, RANKS)[0]
    total = {run: sum(sent.values()) for run, sent in by_run.items()}
    # The columns' traffic is of the bytes looked up, FSDP's of the tables' size.
    assert by_run["columns", 1_001] == by_run["columns", 2_002]
    assert total["fsdp", 2_002] == 2 * total["fsdp", 1_001]
    expected_tables = 2 * len(NGRAMS) * 1_001 * DIM * 2 * (RANKS - 1) // RANKS
    assert total["fsdp", 1_001] == expected_tables, "all-gather and reduce-scatter of all tables, bf16"
    fsdp = total["fsdp", 1_001] * REAL_ROWS / 1_001
    # A rank has its columns of all bytes, keeps its own bytes' and sends the rest; backward likewise.
    columns_of_all = ROW_BYTES * DIM // RANKS * 2
    assert by_run["columns", 1_001] == {
        "all_gather": (ROW_BYTES // RANKS + 7) * 4 * (RANKS - 1),
        "all_to_all": 2 * columns_of_all * (RANKS - 1) // RANKS,
    }
    share = total["columns", 1_001] / fsdp
    print(f"a rank of {RANKS} sends {total['columns', 1_001]:,} bytes by columns, {fsdp:,.0f} by FSDP: {share:.2%}")
    assert share <= 0.10


def drawn_columns() -> list[str]:
    """Return what is drawn here: a rank never holds the table as a whole."""
    drawn = []
    draw = initialization._truncated_normal

    def noted(tensor, std, name, seed):
        drawn.append(name)
        assert tensor.shape == (66,)
        return draw(tensor, std, name, seed)

    initialization._truncated_normal = noted
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "bytes"))
    with torch.device("meta"):
        module = HashEmbedding(8, ngrams=NGRAMS, n_functions=1, n_rows=11)
    shard_columns(module, mesh, compute_dtype=torch.float32)
    module.to_empty(device="cpu")
    parent = nn.Module()
    parent.hash_embedding = module
    initialization.initialize(
        parent, seed=0, depth_scaling="none", stack_depths={}, write=write_shard, local_columns=local_columns
    )
    local = module.weight.to_local()
    assert local.shape == (66, 4)
    assert local.std() > 0
    return drawn


def test_a_rank_draws_its_own_columns():
    names = [f"hash_embedding.weight/{column}" for column in range(8)]
    assert run_distributed(drawn_columns, 4) == [names[:4], names[4:]] * 2
