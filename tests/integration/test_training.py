"""Whole runs: both models learn, a bad loss stops the run, and one rank's figure is what evaluation says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blt_titan.checkpoint.find import latest_checkpoint
from blt_titan.checkpoint.load import load_weights
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.store.shards import ShardSet
from blt_titan.evaluation.rows import batch_scorer, score_batches
from blt_titan.model.blt import BLT
from blt_titan.model.flavors import BLT_FLAVORS
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import CONFIG_FILE, losses, make_trainer, metrics, train

pytestmark = pytest.mark.slow

BITS_ATOL = 1e-5
"""The same fp32 forward over the same rows, in batches of another size."""


def test_the_entropy_model_trains_by_the_same_trainer(small_run, tmp_path):
    overrides = [*small_run, "--model.name=blt_entropy", "--patching.rule=byte", "--data.segment_patches=128"]
    run_distributed(train, 1, str(tmp_path), *overrides, "--checkpoint.no-enable", "--optimizer.lr=2e-3")
    by_step = losses(tmp_path)
    assert by_step[20] < 0.75 * by_step[1]
    assert all(line["mean_patch_bytes"] == 1 for line in metrics(tmp_path) if "mean_patch_bytes" in line)


def train_and_evaluate(out: str, overrides: list[str]) -> tuple[float, float]:
    from blt_titan.config.check import load_run_config
    from blt_titan.data.rows.held_out import HeldOutRows
    from blt_titan.training.data import row_source

    overrides = [*overrides, "--validation.enable", "--validation.local_batch_size=3"]
    train(out, *overrides)
    model = BLT(BLT_FLAVORS["debug"]).eval()
    load_weights(model, latest_checkpoint(f"{out}/checkpoint"))
    config = load_run_config([f"--job.config_file={CONFIG_FILE}", *overrides])
    seq_len = config.training.seq_len
    source = row_source(config.data, config.training, config.patching, "validation", seq_len=seq_len)
    rows = HeldOutRows(source, rows_per_batch=5)
    return score_batches(batch_scorer(model), rows).bits_per_byte, metrics(out)[-1]["heldout_bits_per_byte"]


def test_blt_learns_and_its_checkpoint_scores_what_validation_said(small_run, tmp_path):
    [(evaluated, validated)] = run_distributed(train_and_evaluate, 1, str(tmp_path), small_run)
    assert abs(evaluated - validated) <= BITS_ATOL
    by_step = losses(tmp_path)
    assert by_step[20] < 0.75 * by_step[1]


def test_a_fault_on_a_silent_rank_is_still_named(stdlib_data, small_run, tmp_path):
    """Rank 1 reads a damaged record batch while only rank 0 prints."""
    data = tmp_path / "data"
    shutil.copytree(stdlib_data, data)
    shards = ShardSet(data, "train")
    info = shards.record_batch_info(StreamOrder(len(shards), 12, 0).record_batch(1, 0))
    content = bytearray(info.shard_path.read_bytes())
    content[info.offset + info.length // 2] ^= 1
    info.shard_path.write_bytes(content)
    done = subprocess.run(
        [
            *("./run_train.sh", *small_run, f"--training.dataset_path={data}", f"--job.dump_folder={tmp_path}/out"),
            "--data.verify_bytes_at_start=0",
        ],
        env=os.environ | {"NGPU": "2", "LOG_RANK": "0", "PYTHON": sys.executable, "CONFIG_FILE": str(CONFIG_FILE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"{info.shard_path}: record batch {info.batch_in_shard}" in done.stdout + done.stderr


def train_with_a_poisoned_step(out: str, overrides: list[str]) -> str:
    trainer = make_trainer(out, *overrides, "--checkpoint.interval=2")
    original = trainer.forward_backward_step

    def poisoned(**kwargs):
        loss = original(**kwargs)
        return loss * torch.nan if trainer.step == 5 else loss

    trainer.forward_backward_step = poisoned
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    finally:
        trainer.close()
    return "trained on"


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(small_run, tmp_path):
    [message] = run_distributed(train_with_a_poisoned_step, 1, str(tmp_path), [*small_run, "--metrics.log_freq=100"])
    assert "rank 0" in message
    assert "step 5 is not finite" in message
    assert latest_checkpoint(Path(tmp_path) / "checkpoint").name == "step-4"
