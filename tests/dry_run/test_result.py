"""What makes a dry run sound, what it says, and the bounds that it is held to."""

import dataclasses
import json

import pytest
import torch

from blt_titan.commands import check_cuda
from blt_titan.commands.run_settings import shipped_configs
from blt_titan.dry_run.bounds import AllowedSpill, MemoryBound, allowed_spills, memory_bounds
from blt_titan.dry_run.cards import CARDS, GIB
from blt_titan.dry_run.host_reads import HostRead
from blt_titan.dry_run.kernels import Kernel
from blt_titan.dry_run.memory import Memory
from blt_titan.dry_run.report import report
from blt_titan.dry_run.result import DryRun, GraphResult
from blt_titan.dry_run.roofline import Roofline, Work, assumptions_of
from scripts.check_cuda import faults_of, line_of

QUIET = Kernel("triton_poi_fused_add_0", 32, 0, 1024, 4, "", 10**9, False)
SPILLS = dataclasses.replace(QUIET, name="triton_tem_fused_flex_attention_3", stack_bytes=64)
FORWARD = GraphResult("encoder", False, 3, [], False, [QUIET])
WORK = [Work("blocks: matmuls", 3, 0.5, 1e12, 1e9)]
ROOFLINE = Roofline(WORK, 0.01, {"x": 1e9}, 2.5e14, 10**6, assumptions_of(CARDS["h100"]))
PEAK = 30 * GIB
MEMORY = Memory(PEAK, "backward", {"backward": PEAK}, {"parameters": PEAK}, {"activations: encoder": GIB}, {})


def found(**changes) -> DryRun:
    layout = {"context_parallel": 2}
    plain = DryRun("mine", 8, "h100", "2.13.0", layout, 10**9, MEMORY, [], [], [FORWARD], True, ROOFLINE, 1.0)
    return dataclasses.replace(plain, **changes)


def with_peak(n_bytes: int) -> DryRun:
    return found(memory=dataclasses.replace(MEMORY, peak_bytes=n_bytes))


def test_a_sound_run_says_so():
    assert found().faults() == []
    lines = report(found()).splitlines()
    assert lines[-1] == "sound"
    assert "MFU 51%" in report(found())  # 2.5e14 FLOPs in half a second, of 989e12


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        (
            {"host_reads": [HostRead("_local_scalar_dense", "blt_titan/x.py:3 (forward)", 2)]},
            "host read: _local_scalar",
        ),
        ({"graph_breaks": ["why"]}, "graph break: why"),
        ({"graphs": [dataclasses.replace(FORWARD, recompiled=True)]}, "recompilation: the forward of encoder"),
        ({"graphs": [dataclasses.replace(FORWARD, symbolic=["s0"])]}, "symbolic inputs: the forward of encoder has s0"),
        ({"graphs": [dataclasses.replace(FORWARD, kernels=[SPILLS])]}, "spill: triton_tem_fused_flex_attention_3"),
        (
            {"graphs": [dataclasses.replace(FORWARD, kernels=[dataclasses.replace(QUIET, over_shared=True)])]},
            "shared memory: triton_poi_fused_add_0",
        ),
    ],
)
def test_each_fault_is_a_sentence(changes, begins):
    (fault,) = found(**changes).faults()
    assert fault.startswith(begins)
    assert report(found(**changes)).endswith(f"{fault}\nnot sound: 1 fault")


def test_memory_beside_tensors_counts():
    card = CARDS["h100"]
    fixed = card.beside.context_bytes + card.beside.nccl_bytes + card.beside.workspace_bytes
    fits = int((card.memory_bytes - fixed) / (1 + card.beside.fragmentation_share)) - 1
    assert with_peak(fits).faults() == []
    (fault,) = with_peak(fits + 10**6).faults()
    assert fault.startswith("memory: ")
    assert with_peak(card.memory_bytes).room_bytes < 0


def test_an_exception_is_by_name_and_amount():
    graphs = [dataclasses.replace(FORWARD, kernels=[SPILLS])]
    for spill, faults in (
        (AllowedSpill("triton_tem_*flex*", 64, "why"), 0),
        (AllowedSpill("triton_tem_*flex*", 63, "why"), 1),
        (AllowedSpill("triton_poi_*", 64, "why"), 1),
    ):
        assert len(found(graphs=graphs, allowed_spills=[spill]).faults()) == faults
    assert "allowed: why" in report(found(graphs=graphs, allowed_spills=[AllowedSpill("*flex*", 64, "why")]))


def test_json_gives_the_same_back():
    run = found(graphs=[dataclasses.replace(FORWARD, kernels=[SPILLS])], allowed_spills=[AllowedSpill("*", 1, "x")])
    assert DryRun.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_bound_on_memory_is_named():
    bound = MemoryBound("blt_1b", 8, 29.5, ("--parallelism.context_parallel_degree=2",))
    (fault,) = faults_of(found(), bound)
    assert fault == "memory: 30.00 GiB of tensors is above the bound of 29.5 GiB in bounds.toml"
    assert line_of(found(), bound).startswith("FAILED  blt_1b --parallelism.context_parallel_degree=2 on 8 x h100")
    assert list(faults_of(found(), dataclasses.replace(bound, most_gib=30.0))) == []


def test_the_file_of_bounds_is_whole():
    bounds = memory_bounds()
    assert {bound.config for bound in bounds} == {"blt_1b", "blt_8b", "entropy_100m"} <= set(shipped_configs())
    for config in {bound.config for bound in bounds}:
        assert len([bound for bound in bounds if bound.config == config]) >= 3
        assert any(bound.kernels for bound in bounds if bound.config == config)
    assert all(len(spill.reason) > 20 for spill in allowed_spills())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA")
def test_without_a_cuda_build_it_says_how_to_get_one(capsys):
    assert check_cuda.main(["--config", "blt_1b", "--world-size", "8"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("blt-titan check-cuda: error: torch ")
    for word in ("no CUDA build", "python3.12 -m venv .venv-cuda", "'blt_titan[check-cuda]'", "6 GB"):
        assert word in said.err
    assert said.err.count("\n") == 1
