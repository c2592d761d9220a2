"""The check of a GPU: how its stages report, and that each of them runs, tiny and on a CPU."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blt_titan.bench.shapes import TINY
from blt_titan.gpu_check import attention, training
from blt_titan.gpu_check.stage import Place, Stage, StageError, run_stage
from blt_titan.gpu_check.stages import STAGES
from blt_titan.gpu_check.step import rank_alone
from blt_titan.gpu_check.trace import Span, class_of, reduce_trace, trace_table
from blt_titan.gpu_check.training import plans_1b
from scripts.gpu_check import main, remarks

ROOT = Path(__file__).parents[2]
QUICK_VARIANTS = {"eager", "eager_full", "eager_heads_64", "compiled_float8"}
"""Float8 is emulated on a CPU, without compile; compiled blocks are tested where they are."""


@pytest.fixture
def place(tmp_path) -> Place:
    return Place("cpu", True, tmp_path)


def test_a_trace_is_reduced():
    kernels = [
        Span("nvjet_hsh_64x8", 0, 60),
        Span("triton_poi_fused_mul_0", 50, 70),  # another stream
        Span("ncclDevKernel_AllGather", 100, 110),
        Span("triton_tem_fused_flex_attention_1", 110, 150),
        Span("nvjet_hsh_64x8", 170, 200),
    ]
    calls = [Span("cudaStreamSynchronize", 60, 99), Span("cudaLaunchKernel", 0, 1), Span("cudaMemcpyAsync", 2, 3)]
    found = reduce_trace(kernels[::-1], calls)
    assert math.isclose(found["span_ms"], 0.2)
    assert math.isclose(found["idle_ms"], 0.05)
    assert math.isclose(found["busy_ms"], 0.15)
    assert {kind: part["kernels"] for kind, part in found["by_class"].items()} == {
        "matmul": 2,
        "attention": 1,
        "fused (compiled)": 1,
        "communication": 1,
    }
    assert math.isclose(found["by_class"]["matmul"]["share"], 90 / 160)
    assert [(gap["us"], gap["after"], gap["before"]) for gap in found["gaps"]] == [
        (30, "triton_poi_fused_mul_0", "ncclDevKernel_AllGather"),
        (20, "triton_tem_fused_flex_attention_1", "nvjet_hsh_64x8"),
    ]
    assert found["host_waits"] == {"cudaStreamSynchronize": {"count": 1, "ms": 0.039}}
    assert "wait: cudaStreamSynchronize" in trace_table(found).text()
    with pytest.raises(ValueError, match="no kernel"):
        reduce_trace([], calls)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16", "matmul"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("void at::native::index_elementwise_kernel<128>", "index and sort"),
        ("triton_per_fused__to_copy_mean_mul_rsqrt_3", "fused (compiled)"),
        ("triton_tem_fused_mm_2", "matmul"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("something_else", "other"),
    ],
)
def test_kernels_have_a_class(name, kind):
    assert class_of(name) == kind


def test_a_stage_writes_as_it_goes(place, tmp_path):
    out = tmp_path / "x.json"
    seen = []

    def run(place: Place) -> Iterator[dict[str, Any]]:
        seen.append(json.loads(out.read_text()))
        yield {"ok": False, "steps": 1}
        seen.append(json.loads(out.read_text()))
        yield {"ok": True, "steps": 2}

    result = run_stage("x", Stage("", run), place, out, "the command")
    assert [(s["finished"], s["ok"], s.get("steps")) for s in seen] == [(False, False, None), (False, False, 1)]
    assert result == json.loads(out.read_text())
    assert (result["finished"], result["ok"], result["steps"]) == (True, True, 2)
    assert {"machine", "versions", "commit", "command", "seconds"} <= result.keys()


def test_what_failed_and_what_was_skipped_is_said():
    found = {"stage": "x", "parts": {"a": {"failed": "no memory"}, "b": {"skipped": "not known", "seconds": 1}}}
    assert remarks(found) == ["parts.a: failed: no memory", "parts.b: skipped: not known"]
    assert remarks({"failed": "it was stopped"}) == ["stage: failed: it was stopped"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 3
    assert "no CUDA device is at hand; nothing was checked" in capsys.readouterr().err
    assert main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "takes --tiny too" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_stages_are_listed(capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", said, re.MULTILINE) for name in STAGES)
    assert "  400m_compiled: --model.flavor=400M " in said


def test_a_stage_that_dies_or_is_refused_leaves_the_others(tmp_path, monkeypatch):
    bad = tmp_path / "predictions"
    bad.mkdir()
    (bad / "400m_compiled.json").write_text("{}")
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--predictions", str(bad)]
    assert main([*arguments, "--timeout", "1", "--stage", "tests", "--stage", "memory"]) == 1
    for stage in ("tests", "memory"):
        result = json.loads((tmp_path / f"{stage}.json").read_text())
        assert not result["ok"]
        assert result["failed"] == "it was stopped after 1 s"


def test_predictions_are_what_check_cuda_prints(place, tmp_path):
    place = Place("cpu", True, tmp_path, tmp_path)
    assert training._predicted("400m_eager", place) is None
    (tmp_path / "400m_eager.json").write_text('{"memory": {"peak_bytes": 5}}')
    assert training._predicted("400m_eager", place) == 5
    (tmp_path / "400m_eager.json").write_text('{"memory": 5}')
    with pytest.raises(StageError, match="is not what `blt-titan check-cuda --json` prints"):
        training._predicted("400m_eager", place)


def test_variants_are_what_they_are_called(tmp_path):
    plans = plans_1b(Place("cuda", False, tmp_path))
    assert {plan.args.global_head_dim for plan in plans.values()} == {64, 128}
    for name, plan in plans.items():
        assert ("--compile.enable" in plan.overrides) == name.startswith("compiled"), name
        assert ("--model.converters=quantize.linear.float8" in plan.overrides) == ("float8" in name), name
        assert plan.args.hash_rows == training.HASH_ROWS
        assert plan.work.n_bytes == 24_576
    assert plans["compiled_patch_8"].work.patch_bytes == 8
    assert not plans["compiled_no_mesh"].mesh_of_one


def test_documents_of_attention_fill_the_row():
    shape = attention.SHAPES["local_8_documents"]
    [documents] = attention._documents(shape, 1024, "cpu").tolist()
    assert sorted(documents) == documents
    assert set(documents) == set(range(8))


def test_attention_that_differs_is_found(place, monkeypatch):
    real = attention._work

    def wrong(shape, slots, backend, place):
        work = real(shape, slots, "sdpa", place)
        return (lambda: [2 * x for x in work()]) if backend == "flex" else work

    monkeypatch.setattr(attention, "_work", wrong)
    with pytest.raises(RuntimeError, match="flex differs from sdpa"):
        attention.measure(attention.TINY_SHAPES["local"], "flex", place)


def test_a_backend_that_is_not_known_is_skipped_with_the_reason(place, monkeypatch):
    monkeypatch.setattr(attention, "ON_CPU", ("sdpa", "nosuch"))
    found = list(attention.run(place))[-1]
    assert found["ok"]
    assert "knows no attention_backend 'nosuch'" in found["attention"]["local_nosuch"]["skipped"]
    assert found["attention"]["global_sdpa"]["median_s"] > 0


@pytest.mark.slow
def test_steps_of_training_are_measured(place, monkeypatch):
    plans = {name: plan for name, plan in plans_1b(place).items() if name in QUICK_VARIANTS}
    assert plans.keys() == QUICK_VARIANTS
    monkeypatch.setattr(training, "plans_1b", lambda place: plans)
    found = list(training.train_1b(place))[-1]
    assert found["ok"], found
    for part in found["steps"].values():
        assert part["bytes_per_s"] > 0
        assert part["loss_last"] < part["loss_first"]
    assert any(o.endswith("float8.emulate") for o in found["steps"]["compiled_float8"]["overrides"])


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others(place, monkeypatch):
    plans = plans_1b(place)
    bad = training.StepPlan(TINY, plans["eager"].work, overrides=("--compile.enable", "--compile.backend=nosuch"))
    monkeypatch.setattr(training, "plans_1b", lambda place: {"bad": bad, "eager": plans["eager"]})
    found = list(training.train_1b(place))[-1]
    assert not found["ok"]
    assert "nosuch" in found["steps"]["bad"]["failed"]
    assert found["steps"]["eager"]["median_s"] > 0


@pytest.mark.slow
def test_slices_are_extended_to_all_layers(place, monkeypatch):
    monkeypatch.setattr(training, "COMPILED", training.EAGER)
    found = list(training.train_8b(place))[-1]
    assert found["ok"], found
    few, more = (found["steps"][f"bf16_{layers}"]["median_s"] for layers in training.SLICES)
    layer_s = (more - few) / (training.SLICES[1] - training.SLICES[0])
    assert math.isclose(found["whole"]["bf16"]["step_s"], few + (32 - training.SLICES[0]) * layer_s)


@pytest.mark.slow
def test_a_run_validates_writes_a_checkpoint_and_goes_on(place):
    found = list(STAGES["run"].run(place))[-1]
    assert found["ok"], found
    runs = found["runs"]
    assert [line["step"] for line in runs["run"]["metrics"] if "loss_nats" in line] == [1, 2]
    assert [line["step"] for line in runs["resume"]["metrics"] if "loss_nats" in line] == [1, 2, 3]
    assert "heldout_bits_per_byte" in runs["run"]["metrics"][-1]
    assert (place.folder / "run/checkpoint/step-2").is_dir()


@pytest.mark.slow
def test_the_other_stages_run(tmp_path):
    """Each in a process of its own, as on a GPU."""
    stages = ["attention", "scoring", "generation", "tests"]
    asked = [word for stage in stages for word in ("--stage", stage)]
    command = [sys.executable, "-m", "scripts.gpu_check", "--device", "cpu", "--tiny", "--out", str(tmp_path), *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in stages}
    assert all(result["finished"] and result["ok"] for result in results.values())
    assert "captures no CUDA graphs" in done.stdout or "cuda_graphs" not in results["generation"]["generation"]


@pytest.mark.slow
def test_a_step_is_traced(place):
    from blt_titan.gpu_check.trace import profile_step

    with rank_alone(place):
        found = profile_step(plans_1b(place)["eager"], place)
    assert found["by_class"]["matmul"]["kernels"] > 20
    assert found["span_ms"] > found["busy_ms"] > 0
    assert "matmul" in found["table"]
