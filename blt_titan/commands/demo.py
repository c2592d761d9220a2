"""From raw text to a trained BLT in about ten minutes: what `make demo` runs.

    blt-titan demo                       # as `make demo`
    blt-titan demo --steps 50            # a shorter look: 50 steps of either model

The two stages of the paper, on the Python standard library's sources: an entropy model is trained,
scores the text, and a threshold is chosen; then a BLT is trained on the patches that it cuts. Held-out text is scored
before and after. Figures, pictures, a page of patches and checkpoints stay under outputs/demo.
"""

import argparse
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from blt_titan.checkpoint.find import latest_checkpoint
from blt_titan.checkpoint.load import load_entropy_model, load_weights
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.commands.arguments import Parser, whole
from blt_titan.commands.ending import command
from blt_titan.commands.run_settings import SHIPPED
from blt_titan.config.check import load_run_config
from blt_titan.data.prepare.job import prepare
from blt_titan.data.rows.held_out import HeldOutRows
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import EntropySidecar
from blt_titan.evaluation.rows import HeldOutScore, batch_scorer, score_batches
from blt_titan.inference.generate import generate
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.patching.rule import PatchRule
from blt_titan.plots.patch_page import patch_page
from blt_titan.progress import ProgressBar
from blt_titan.scoring.calibration import best_budgets, calibrate, read_sample
from blt_titan.scoring.entropies import EntropyScorer
from blt_titan.scoring.score_data import score_data, sidecar_settings
from blt_titan.training.data import row_source

CONFIG_FILE = SHIPPED / "debug.toml"
ENTROPY_CONFIG_FILE = SHIPPED / "entropy_debug.toml"
OUT = Path("outputs/demo")
DATA = OUT / "data"
DATA_BYTES = 5_000_000
TARGET_PATCH_BYTES = 4.5
SEGMENT_PATCHES = 128
MAX_PATCH_BYTES = 512
FREE_DISK_GIB = 1
PROMPT = b"def read_file(path):\n    "
PROMPT_BYTES = 200
PAGE_BYTES = 4000


class DemoError(RuntimeError):
    """Something that the demo cannot go on without."""


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser("blt-titan demo", __doc__)
    parser.add_argument("--steps", type=whole(1, 10**9), metavar="N", help="training steps (default: as in the TOML)")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command("blt-titan demo", DemoError, DataError, CheckpointError, code=1)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; give its exit code: 0, or 1 if it cannot go on."""
    run(parse_args(arguments).steps)
    return 0


def run(steps: int | None) -> None:
    """Prepare; train, score and calibrate; train, score again, draw and summarise."""
    began = time.perf_counter()
    _make_room()
    print("1/6  Byte shards from the Python standard library's own sources", flush=True)
    prepare(
        ["python-stdlib"],
        DATA,
        validation_fraction=0.05,
        seed=0,
        max_bytes=DATA_BYTES,
        record_batch_bytes=8 * 1024,
        progress=False,
    )
    shared = [f"--training.dataset_path={DATA}", *([f"--training.steps={steps}"] if steps else [])]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    entropy_out = OUT / "entropy"
    print(f"2/6  Training an entropy model (log: {entropy_out}/train.log)", flush=True)
    _train(ENTROPY_CONFIG_FILE, entropy_out, shared)

    print("3/6  Scoring the text with it, and choosing a threshold", flush=True)
    threshold, segment_bytes = _score_and_calibrate(entropy_out, device)
    overrides = [
        *shared,
        "--patching.rule=global",
        f"--patching.threshold={threshold!r}",
        f"--patching.max_patch_bytes={MAX_PATCH_BYTES}",
        f"--data.segment_patches={SEGMENT_PATCHES}",
        f"--data.segment_bytes={segment_bytes}",
        f"--training.seq_len={2 * segment_bytes}",
    ]
    config = load_run_config([f"--job.config_file={CONFIG_FILE}", f"--job.dump_folder={OUT}", *overrides])

    print("4/6  The untrained BLT on the held-out split", flush=True)
    args = replace(BLT_FLAVORS[config.model.flavor])
    args.update_from_config(config)
    model = BLT(args).to(device).eval()
    with torch.no_grad():
        model.init_weights()
    small = load_entropy_model(entropy_out, device=device)
    score_before, text_before = _examine(model, config, device, small)

    print(f"5/6  Training it, {config.training.steps} steps (log: {OUT}/train.log)", flush=True)
    _train(CONFIG_FILE, OUT, overrides)

    print("6/6  The trained BLT on the held-out split", flush=True)
    load_weights(model, latest_checkpoint(OUT / config.checkpoint.folder))
    score_after, text_after = _examine(model, config, device, small)

    lines = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss_nats" in line]
    summary = {
        "heldout_bits_per_byte_start": score_before.bits_per_byte,
        "heldout_bits_per_byte_end": score_after.bits_per_byte,
        "gzip_bits_per_byte": _gzip_bits_per_byte(),
        "heldout_bytes": score_after.n_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.training.steps,
        "threshold_nats": threshold,
        # The first interval holds start-up.
        **{
            key: sum(line[key] for line in training[1:]) / max(1, len(training) - 1)
            for key in ("bytes_per_second", "padded_byte_share", "padded_patch_share", "mean_patch_bytes")
        },
        "seconds": time.perf_counter() - began,
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _draw(lines, summary)
    _report(summary, text_before, text_after)


def _make_room() -> None:
    Path("outputs").mkdir(exist_ok=True)
    free_gib = shutil.disk_usage("outputs").free / 2**30
    if free_gib < FREE_DISK_GIB:
        raise DemoError(f"{FREE_DISK_GIB} GiB of free disk are needed under outputs/, there are {free_gib:.1f}")
    if OUT.exists():
        names = (OUT.with_name(f"{OUT.name}-previous{f'-{i}' if i > 1 else ''}") for i in itertools.count(1))
        previous = next(name for name in names if not name.exists())
        OUT.rename(previous)
        print(f"(an earlier demo was moved to {previous})")
    OUT.mkdir()


def _score_and_calibrate(entropy_out: Path, device: torch.device) -> tuple[float, int]:
    """Write a sidecar and a page of patches; return the threshold and the bytes of a segment."""
    model = load_entropy_model(entropy_out, device=device)
    settings = sidecar_settings(model, "float16", "float32")
    score_data(DATA, "default", EntropyScorer(model), settings, progress=True)
    shards = ShardSet(DATA, "train")
    sample = read_sample(shards, EntropySidecar(DATA, "default", shards), sample_bytes=DATA_BYTES)
    found = calibrate(sample, TARGET_PATCH_BYTES, max_patch_bytes=MAX_PATCH_BYTES)
    assert found.threshold is not None
    flavor, mean = BLT_FLAVORS["debug"], found.mean_patch_bytes
    parts = flavor.flops_by_part(1024, mean)
    [budget] = best_budgets(
        found.lengths,
        cost_of_byte=parts.encoder + parts.decoder,
        cost_of_patch=flavor.global_layers * parts.global_layer * mean,
        longest_patch=MAX_PATCH_BYTES,
        segment_patches=[SEGMENT_PATCHES],
    )
    print(
        f"     threshold {found.threshold:.4f} nats: {mean:.2f} bytes in a patch; segments of {budget.patches} patches "
        f"and {budget.bytes} bytes, {budget.padded_compute:.1%} of compute is padding"
    )
    held_out = ShardSet(DATA, "validation")
    batch = held_out.read(0)
    end = min(int(batch.offsets[1]), PAGE_BYTES)
    page = patch_page(
        batch.text[:end].tobytes(),
        EntropySidecar(DATA, "default", held_out)(batch)[:end],
        title=batch.doc_ids[0],
        threshold=found.threshold,
        max_patch_bytes=MAX_PATCH_BYTES,
    )
    (OUT / "patches.html").write_text(page, encoding="utf-8")
    (OUT / "patch_lengths.json").write_text(json.dumps(found.distribution()) + "\n")
    return found.threshold, budget.bytes


def _examine(model: BLT, config, device: torch.device, small: EntropyModel) -> tuple[HeldOutScore, str]:
    source = row_source(config.data, config.training, config.patching, "validation", seq_len=config.training.seq_len)
    batches = HeldOutRows(source, rows_per_batch=config.training.local_batch_size)
    score = score_batches(
        batch_scorer(model), ProgressBar(batches, desc="     held-out", unit="batch", leave=False), device=device
    )
    rule = PatchRule.of(config.patching)
    text = generate(model, PROMPT, rule=rule, entropy_model=small, max_bytes=PROMPT_BYTES, temperature=0.7)
    return score, text.decode(errors="replace")


def _train(config_file: Path, out: Path, overrides: list[str]) -> None:
    arguments = [f"--job.dump_folder={out}", *overrides, "--metrics.log_freq=5"]
    steps = load_run_config([f"--job.config_file={config_file}", *arguments]).training.steps
    metrics = out / "metrics.jsonl"
    out.mkdir(exist_ok=True)
    with (out / "train.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "blt_titan", "train", str(config_file), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        with ProgressBar(total=steps, desc="     training", unit="step") as bar:
            try:
                while process.poll() is None:
                    time.sleep(1)
                    _advance(bar, metrics)
            finally:  # after Ctrl-C it may still run
                process.terminate()
                process.wait()
            _advance(bar, metrics)
    if process.returncode:
        tail = "\n".join((out / "train.log").read_text().splitlines()[-15:])
        raise DemoError(f"training ended with exit code {process.returncode}; the end of {out}/train.log:\n{tail}")


def _advance(bar: ProgressBar, metrics: Path) -> None:
    if not metrics.exists():
        return
    # The last line may be half written.
    lines = [json.loads(line) for line in metrics.read_text().split("\n")[:-1]]
    training = [line for line in lines if "bits_per_byte" in line]
    if training:
        last = training[-1]
        bar.update(last["step"] - bar.n)
        bar.set_postfix_str(f"{last['bits_per_byte']:.2f} bits/byte, {last['bytes_per_second']:,.0f} bytes/s")


def _gzip_bits_per_byte() -> float:
    held_out = b"".join(batch.text.tobytes() for batch in ShardSet(DATA, "validation"))
    return 8 * len(gzip.compress(held_out, compresslevel=9)) / len(held_out)


def _draw(lines: list[dict], summary: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    training = [line for line in lines if "bits_per_byte" in line]
    held_out = [line for line in lines if "heldout_bits_per_byte" in line]
    held_out_steps = [0] + [line["step"] for line in held_out]
    held_out_bits = [summary["heldout_bits_per_byte_start"]] + [line["heldout_bits_per_byte"] for line in held_out]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot([line["step"] for line in training], [line["bits_per_byte"] for line in training], lw=1, label="training")
    axes.plot(held_out_steps, held_out_bits, "o-", label="held-out")
    axes.axhline(summary["gzip_bits_per_byte"], ls="--", color="grey", label="gzip -9 of the held-out bytes")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None), title="Debug BLT on the standard library's sources")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(OUT / "loss.png")
    plt.close(figure)


def _report(summary: dict, text_before: str, text_after: str) -> None:
    def block(text: str) -> str:
        return "\n".join("    | " + line for line in (PROMPT.decode() + text).splitlines())

    print(
        f"""
The prompt, and {PROMPT_BYTES} bytes sampled by the untrained model:
{block(text_before)}
The same after training:
{block(text_after)}

held-out     {summary["heldout_bits_per_byte_start"]:.3f} -> {summary["heldout_bits_per_byte_end"]:.3f} bits per byte
gzip -9      {summary["gzip_bits_per_byte"]:.3f} bits per byte: minutes of training on a CPU do not beat it
speed        {summary["bytes_per_second"]:,.0f} bytes/s in training, {summary["seconds"]:.0f} s in all
padding      {summary["padded_byte_share"]:.1%} of byte slots, {summary["padded_patch_share"]:.1%} of patch slots
patches      {summary["mean_patch_bytes"]:.2f} bytes on average, at a threshold of {summary["threshold_nats"]:.4f} nats
left behind  {OUT}/: loss.png, summary.json, metrics.jsonl, train.log, tb/ (TensorBoard), checkpoint/, entropy/
generate     blt-titan generate --model {OUT} --entropy-checkpoint {OUT}/entropy --prompt "def "
run next     blt-titan train debug
the patches  {OUT}/patches.html"""
    )
