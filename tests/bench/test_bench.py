"""The benchmarks: rows and peers are what they are said to be, and every suite runs and reports."""

import json
import math
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blt_titan.batch import PADDING
from blt_titan.bench.in_turn import measure_in_turn
from blt_titan.bench.options import Options
from blt_titan.bench.peers import PEERS, PeerSpec
from blt_titan.bench.rows import Work, draw_rows
from blt_titan.bench.shapes import BENCH, SHAPES, TINY, equal_llama, weight_products
from blt_titan.bench.suites import SUITES, failures, tables
from blt_titan.bench.worker import PeerFailedError, Worker, same_loss
from blt_titan.byte_vocab import BOS_ID
from blt_titan.commands.bench import main
from blt_titan.model.blt import BLT

SPEC = PeerSpec("eager", TINY, Work(1, 64), device="cpu")
FLOPS_RTOL = 0.01
"""The feed-forward width of the Llama is rounded to 8 of more than a thousand."""
MEASURED_WITH = {
    "train-step": {"transformers", "eager", "compiled", "llama", "floor"},
    "memory": {"transformers", "eager", "compiled"},
    "scaling": {"eager", "compiled", "eager_base", "compiled_base"},
    "patch-size": {"eager", "compiled"},
}


@pytest.mark.parametrize("work", [Work(2, 1024), Work(1, 8192, 6.0), Work(1, 63, 8.0), Work(3, 32, 4.5)])
def test_rows_are_one_document_each_with_the_mean_patch_that_was_asked(work):
    ids_BS, layout, labels_BS = draw_rows(work).batch
    lengths_BP = draw_rows(work).patch_lengths_BP
    assert ids_BS.shape == (work.rows, work.n_bytes)
    assert (ids_BS[:, 0] == BOS_ID).all()
    assert (ids_BS[:, 1:] == labels_BS[:, :-1]).all()
    assert (layout.byte_doc_BS == 0).all()
    assert (lengths_BP[:, 0] == 1).all()
    assert (lengths_BP > 0).all()
    assert (lengths_BP.sum(1) == work.n_bytes + 1).all()
    assert abs(work.n_bytes / (work.patches - 1) - work.patch_bytes) < work.patch_bytes / (work.patches - 1)
    assert layout.patch_doc_BP.shape == (work.rows, work.patch_slots)
    assert (layout.source_patch_BS != PADDING).all()
    assert len({int(length) for length in lengths_BP.flatten()}) > 3, "lengths differ"
    assert all(torch.equal(a, b) for a, b in zip(draw_rows(work).batch[1][:-1], layout[:-1], strict=True))


def test_patch_slots_are_an_eighth_more_than_patches():
    assert [Work(1, 8192, size).patch_slots for size in (4.5, 6.0, 8.0)] == [2048, 1536, 1152]


@pytest.mark.parametrize("shape", ["bench", "1B", "8B"])
def test_a_byte_of_the_llama_costs_what_one_of_ours_does(shape):
    work = Work(1, 8192)
    llama = equal_llama(SHAPES[shape], work)
    ours = SHAPES[shape].forward_flops_per_byte(work.n_bytes, work.patch_bytes)
    assert math.isclose(llama.flops_per_byte(work.n_bytes), ours, rel_tol=FLOPS_RTOL)
    assert llama.dim == SHAPES[shape].global_dim


@pytest.mark.parametrize(
    "args", [TINY, replace(TINY, cross_attn_k=4, decoder_layers=3, encoder_layers=2), replace(TINY, global_dim=96)]
)
def test_the_floor_has_the_products_of_the_model(args):
    work = Work(2, 160)
    ids_BS, layout, _ = draw_rows(work).batch
    model = BLT(args)
    model.init_weights()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(ids_BS, layout)
    products = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == sum(2 * p.m * p.k * p.n * p.times for p in weight_products(args, work))


def test_what_a_peer_cannot_do_is_a_sentence(monkeypatch):
    with Worker(replace(SPEC, args=replace(TINY, local_heads=3))) as worker:
        with pytest.raises(PeerFailedError, match="ValueError: local_dim = 32 must be an even multiple of local_heads"):
            worker.step()
        with pytest.raises(PeerFailedError):
            worker.peak_bytes()


def test_a_process_that_dies_leaves_the_others():
    options = Options(tiny=True, repeats=1)
    worker = Worker(SPEC)
    with worker:
        worker.step()
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(PeerFailedError, match="killed by SIGKILL; the machine may have too little memory"):
            worker.step()
    bad = replace(SPEC, args=replace(TINY, local_heads=3))
    found = measure_in_turn({"good": SPEC, "bad": bad}, options, "test")
    assert found["good"]["bytes_per_s"] == 64 / found["good"]["median_s"]
    assert "even multiple" in found["bad"]["failed"]


def test_memory_is_that_of_the_step():
    """Twice the rows keep twice the activations; what the process had before does not count."""
    peaks = []
    for rows in (8, 16):
        with Worker(replace(SPEC, work=Work(rows, 2048))) as worker:
            worker.step()
            peaks.append(worker.peak_bytes())
    assert 1.5 < peaks[1] / peaks[0] < 2.5, peaks


def test_losses_that_differ_are_said():
    assert same_loss({"eager": 5.56, "transformers": 5.5600001}) == ""
    assert same_loss({"eager": 5.5, "transformers": 5.6}).endswith("differ: eager 5.50000, transformers 5.60000")
    assert same_loss({"eager": float("nan"), "transformers": 5.6})


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_runs_and_reports(suite, tmp_path, capsys):
    if suite in ("train-step", "memory", "generation"):
        pytest.importorskip("transformers", reason="install the dev extra to compare with transformers")
    out = tmp_path / "result.json"
    assert main([suite, "--tiny", "--no-progress", "--out", str(out)]) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["command"] == f"blt-titan bench {suite} --tiny --no-progress --out {out}"
    assert result["machine"]["cpu"]
    assert result["machine"]["cores"] == os.cpu_count()
    assert result["versions"]["torch"] == torch.__version__
    assert re.match(r"[0-9a-f]{40}|not a checkout", result["commit"])
    figures = result["suites"][suite]
    assert figures["settings"]["repeats"] == 2
    for work in figures.get("works", []):
        assert work["peers"].keys() == MEASURED_WITH[suite]
        for name, peer in work["peers"].items():
            if suite == "memory":
                assert peer["peak_bytes"] > 0, name
            else:
                assert peer["median_s"] > 0, name
                assert len(peer["seconds"]) == 2
        assert work["ratios"]
        assert all(ratio > 0 for ratio in work["ratios"].values())
    assert "median" in json.dumps(figures) or suite == "memory"
    [table] = tables(result)
    assert table.title in capsys.readouterr().out
    assert all(len(row) == len(table.header) for row in table.rows)
    assert not failures(result)


def test_failures_are_reported():
    figures = {"works": [{"rows": 1, "row_bytes": 8192, "peers": {"eager": {"failed": "no memory"}, "floor": {}}}]}
    assert failures({"suites": {"train-step": figures}}) == ["train-step 1 x 8,192: eager: no memory"]


def test_every_peer_has_a_name():
    assert set(PEERS) == MEASURED_WITH["train-step"]
    assert BENCH.forward_flops_per_byte(8192, 4.5) > 1e7
