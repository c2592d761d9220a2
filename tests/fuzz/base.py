"""What cases copy their inputs from, made once: byte shards with entropies, checkpoints, a model directory, a run."""

import json
import random
import shutil
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan.checkpoint.storage_writer import DigestWriter
from blt_titan.commands import prepare as prepare_data
from blt_titan.commands import score as score_entropies
from blt_titan.hf.export import export_hf, stored_weights
from blt_titan.monitor.record import LOCK_NAME, RunRecord
from tests.helpers.hf_models import write_checkpoints

STREAMS = 4
DATA, MODELS, HF, RUN, SMALL, OPERATED = "data", "models", "hf", "run", "small", "operated"


def make_base(folder: Path) -> None:
    """Write everything into a folder.

    data/       byte shards of 20 KB and their entropies, `default`
    models/     checkpoints, `blt` and `entropy`; `of_run` is a run's folder with two steps of the BLT
    hf/         the same BLT and entropy model as a model directory
    run/        what the page of plots shows
    operated/   the folder of a run that has ended: what it says of itself, settings, lock, sound and half-written steps
    small/      a few shards only, of which cases of many files make copies quickly
    """
    draw = random.Random(0)
    texts = folder / "texts"
    texts.mkdir()
    known = ["the", "of", "a", "patch", "byte", "entropy", "model,", "and.", "(x)", "\n", "é", "日本"]
    for number in range(60):
        words = draw.choices(known, k=draw.randint(5, 120))
        (texts / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    prepare = ["--source", str(texts), "--validation-fraction=0.2", "--workers=1", "--no-progress"]
    sizes = ["--record-batch-bytes=1500", "--shard-bytes=6KB"]
    _run(prepare_data.main, [*prepare, *sizes, "--out", str(folder / DATA)])
    _run(prepare_data.main, [*prepare, "--max-bytes=3KB", "--record-batch-bytes=500", "--out", str(folder / SMALL)])
    write_checkpoints(folder / MODELS)
    for data in (DATA, SMALL):
        score = ["--data", str(folder / data), "--checkpoint", str(folder / MODELS / "entropy"), "--device=cpu"]
        _run(score_entropies.main, [*score, "--no-progress"])
    for step in (1, 20):
        shutil.copytree(folder / MODELS / "blt", folder / MODELS / "of_run" / "checkpoint" / f"step-{step}")
    export_hf(stored_weights(folder / MODELS / "blt"), folder / HF, entropy=stored_weights(folder / MODELS / "entropy"))
    _write_operated(folder / OPERATED)
    _write_run(folder / RUN / "one", steps=30)
    _write_run(folder / RUN / "more" / "two", steps=3000)


def _run(main, arguments: list[str]) -> None:
    if main(arguments) != 0:
        raise RuntimeError(f"{main.__module__} {arguments}: cannot make the inputs of the cases")


def _write_operated(run: Path) -> None:
    checkpoints = run / "checkpoint"
    for name in ("step-2", "step-4", "step-6", "abandoned-20260101-000000/step-8"):
        weights = {"weight": torch.full((300,), 0.5), "step": torch.tensor(int(name.rpartition("-")[2]))}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(weights, storage_writer=DigestWriter(checkpoints / name), no_dist=True)
    (checkpoints / "step-10").mkdir()
    (checkpoints / "step-10/__0_0.distcp").write_bytes(b"torn")
    (run / LOCK_NAME).write_text(json.dumps({"host": "node7", "pid": 4711, "since": "2026-01-01 00:00:00"}) + "\n")
    (run / "config.toml").write_text('[checkpoint]\nfolder = "checkpoint"\n')
    record = RunRecord()
    record.begin(run, rank=0, world_size=2, steps=20, log_freq=2, checkpoints=checkpoints)
    for step in (2, 4, 6):
        record.line(step, bytes_per_second=1e4, bits_per_byte=8 / step)
    record.held_out(4, 2.5)
    record.warning(6, "bytes/s fell to half of what they were")
    record.made(6)
    record.end("failed", 1, "loader worker 1 (process 4712) ended (by SIGKILL)")


def _write_run(run: Path, *, steps: int) -> None:
    run.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss_nats": 5 / step, "bits_per_byte": 8 / step, "training_flops": 1e9 * step}
        if step % 10 == 0:
            line["heldout_bits_per_byte"] = 8 / step + 0.1
        lines.append(json.dumps(line))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "patch_lengths.json").write_text(json.dumps({"rule": "global", "counts": [0, 5, 3, 1], "mean": 1.5}))
    (run / "patches.html").write_text("<!doctype html><p>patches</p>")
    (run / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
