"""Two stages: an entropy model from the trainer decides the patches of a BLT, from files or while it trains."""

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from blt_titan.checkpoint.find import find_checkpoint
from blt_titan.checkpoint.load import describe_model, load_entropy_model
from blt_titan.commands.calibrate import main as calibrate_threshold
from blt_titan.commands.score import main as score_entropies
from blt_titan.commands.view import main as view_patches
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardSet
from blt_titan.training.row_ranks import RowsDifferError
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, metrics, train

pytestmark = pytest.mark.slow

BY_ENTROPY = [
    "--patching.rule=global",
    "--patching.threshold=2.0",
    "--training.steps=6",
    "--checkpoint.interval=3",
]
ENTROPY_RUN = [
    "--model.name=blt_entropy",
    "--patching.rule=byte",
    "--data.segment_patches=128",
    "--training.seq_len=256",
    "--training.steps=30",
    "--lr_scheduler.total_steps=30",
    "--entropy_model.reset_at_newline",
]
SHARED_ROWS = {
    "tp": ["--parallelism.tensor_parallel_degree=2"],
    "pp": ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"],
}
LAYOUT_LOSS_ATOL = 1e-4
"""Six steps of AdamW in other summation orders."""
ONLINE_LOSS_ATOL = 1e-3
"""A boundary on a decision edge may fall on the other side; more of the run than that must not change."""


def two_stages(root: str, small_run: list[str], data: str) -> None:
    """Train an entropy model, score, calibrate; then BLTs by rule: from a sidecar, again, online, and resumed."""
    out = f"{root}/entropy"
    train(out, *small_run, *ENTROPY_RUN)
    score = ["--data", data, "--checkpoint", out, "--no-progress", "--device", "cpu"]
    assert score_entropies(score) == 0
    assert score_entropies([*score, "--quantize", "uint8", "--name", "small"]) == 0
    by_entropy = [*small_run, *BY_ENTROPY]
    train(f"{root}/sidecar", *by_entropy)
    train(f"{root}/workers", *by_entropy, "--training.dataloader.num_workers=2")
    online = ["--patching.source=online", f"--patching.entropy_checkpoint={out}"]
    train(f"{root}/online", *by_entropy, *online)
    train(f"{root}/resumed", *by_entropy, *online, "--training.steps=3")
    train(f"{root}/resumed", *by_entropy, *online)
    monotonic = ["--patching.rule=monotonic", "--patching.threshold=0.5"]
    train(f"{root}/monotonic", *by_entropy, *monotonic)
    train(f"{root}/monotonic_uint8", *by_entropy, *monotonic, "--patching.sidecar=small")


def online_on_shared_rows(root: str, by_entropy: list[str], data: str) -> list[str]:
    """Train online where two ranks read the same rows; then let one of them miss a record batch."""
    online = ["--patching.source=online", f"--patching.entropy_checkpoint={root}/entropy"]
    for name, layout in SHARED_ROWS.items():
        train(f"{root}/online_{name}", *by_entropy, *online, *layout)
    read, failed = ShardSet.read, []

    def failing(self, i):
        if not failed and self.split == "train":
            failed.append(i)
            raise DataError("this rank's disk failed")
        return read(self, i)

    if dist.get_rank() == 1:
        # As if this rank's disk had failed once.
        ShardSet.read = failing
    messages = []
    for name, source in (("torn", []), ("torn_online", online)):
        failed.clear()
        try:
            train(f"{root}/{name}", *by_entropy, *SHARED_ROWS["tp"], *source, "--data.on_damage=quarantine")
        except RowsDifferError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def data(stdlib_data, tmp_path_factory) -> Path:
    """A copy, which gets a sidecar."""
    return shutil.copytree(stdlib_data, tmp_path_factory.mktemp("two_stages") / "data")


@pytest.fixture(scope="module")
def trained(small_run, data) -> Path:
    overrides = [*small_run, f"--training.dataset_path={data}"]
    run_distributed(two_stages, 1, str(data.parent), overrides, str(data))
    return data.parent


def test_sidecar_workers_online_and_resume_train_the_same_rows(trained):
    expected = losses(trained / "sidecar")
    assert losses(trained / "workers") == expected
    online = losses(trained / "online")
    assert online.keys() == expected.keys()
    assert max(abs(online[step] - expected[step]) for step in expected) <= ONLINE_LOSS_ATOL
    assert losses(trained / "resumed") == online
    sizes = {name: metrics(trained / name)[-1]["mean_patch_bytes"] for name in ("sidecar", "online", "monotonic")}
    assert abs(sizes["sidecar"] - sizes["online"]) < 0.01 * sizes["sidecar"]
    assert sizes["monotonic"] != sizes["sidecar"]


def test_ranks_that_share_rows_cut_the_same_patches_or_stop(trained, small_run, data):
    overrides = [*small_run, *BY_ENTROPY, f"--training.dataset_path={data}"]
    messages = run_distributed(online_on_shared_rows, 2, str(trained), overrides, str(data))
    expected = losses(trained / "online")
    for name in SHARED_ROWS:
        found = losses(trained / f"online_{name}")
        assert found.keys() == expected.keys()
        assert max(abs(found[step] - expected[step]) for step in expected) <= LAYOUT_LOSS_ATOL, name
    for by_sidecar, online in messages:
        assert "at step 1 ranks that read the same rows are not at the same place" in by_sidecar
        assert "ranks that read the same rows are at different record batches" in online


def test_the_cost_of_scoring_online_is_a_metric(trained):
    shares = [line["online_entropy_share"] for line in metrics(trained / "online")]
    assert all(0 <= share < 1 for share in shares)
    assert max(shares) > 0
    assert "online_entropy_share" not in metrics(trained / "sidecar")[-1]


def test_the_checkpoint_and_the_sidecar_say_what_the_model_is(trained, data):
    described = describe_model(find_checkpoint(trained / "entropy"))
    assert described.name == "blt_entropy"
    assert described.args.reset_at_newline is True
    assert load_entropy_model(trained / "entropy").args.reset_at_newline
    for name, storage in (("sidecar", "float16"), ("online", "float16"), ("monotonic_uint8", "uint8")):
        assert describe_model(find_checkpoint(trained / name)).rule.storage == storage
    sidecar = json.loads((data / "entropies" / "default" / "sidecar.json").read_text())
    assert sidecar["settings"]["model"]["reset_at_newline"] is True


def test_calibration_prints_lines_that_train(trained, data, tmp_path, capsys):
    picture = tmp_path / "patches.png"
    arguments = ["--data", str(data), "--target-patch-bytes", "4", "--flavor", "debug", "--png", str(picture)]
    assert calibrate_threshold(arguments) == 0
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    threshold = float(printed.split("\nthreshold = ")[1].split()[0])
    assert '[patching]\nrule = "global"' in printed
    assert "[data]\nsegment_bytes = " in printed
    assert 0 < threshold < 5
    assert calibrate_threshold([*arguments[:3], "100000", *arguments[4:]]) == 2
    assert "cannot be had" in capsys.readouterr().err


def test_a_page_shows_a_document_of_the_data_or_a_text(trained, data, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert view_patches(["--data", str(data), "--doc", "1", "--out", str(page)]) == 0
    assert '"entropies": [' in page.read_text()
    text = ["--text", "to be, or not to be", "--out", str(page)]
    assert view_patches([*text, "--checkpoint", str(trained / "entropy")]) == 0
    shown = json.loads(page.read_text().split("const page = ")[1].split(";\n")[0])
    assert bytes(shown["bytes"]) == b"to be, or not to be"
    assert len(shown["entropies"]) == len(shown["bytes"])
    assert view_patches(text) == 2
    assert "--text needs --checkpoint" in capsys.readouterr().err
    assert view_patches(["--data", str(data), "--doc", "100000", "--out", str(page)]) == 2
    assert "has documents 0 to" in capsys.readouterr().err
