"""The checkpoints in tests/checkpoint/kept, written by an earlier commit, and how they were made.

    python -m tests.helpers.kept_checkpoint FILE.tar.xz

makes the like of them: byte shards of a short text, `run`, the folder of a run of an entropy model of 2,000 parameters
that was stopped at step 2 of 4, `blt`, a BLT of 4,000 parameters as `blt-titan import` writes one, and `expected.json`,
the numbers that both give. It is an archive because a checkpoint has an entry for each number of its optimizer, of a
kilobyte each and nearly all alike. Paths are relative while they are written, so no machine is named in them.

They are kept to show that what was written once can be read later: replace them only with a version of the description
that this release no longer reads, and say so in CHANGELOG.md.
"""

import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blt_titan import BLT
from blt_titan.byte_vocab import BOS_ID, bytes_to_ids
from blt_titan.checkpoint.load import load_entropy_model
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.sidecars import fingerprint_of
from blt_titan.hf.load import load_for_inference
from blt_titan.inference.generate import generate
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.flavors import ENTROPY_FLAVORS
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer
from blt_titan.scoring.score_data import sidecar_settings
from tests.helpers.distributed import run_distributed
from tests.helpers.training_runs import losses, train

KEPT = Path(__file__).parents[1] / "checkpoint" / "kept" / "version_1.tar.xz"
TEXT = "A house has many rooms, and every fact lives in one of them. Who looks for it asks there, and nowhere else.\n"
PROMPT = b"A house has"
FLAVOR = "kept"
ENTROPY_ARGS = EntropyModelArgs(dim=4, n_heads=2, n_layers=1, ffn_hidden=8, window=16)
BLT_ARGS = BLTArgs(
    local_dim=4,
    local_heads=2,
    local_window=16,
    local_ffn_hidden=8,
    encoder_layers=1,
    decoder_layers=1,
    global_dim=8,
    global_heads=2,
    global_layers=1,
    global_ffn_hidden=8,
    cross_attn_heads=2,
    hash_ngrams=(3, 4),
    hash_rows=101,
)
RULE = PatchRule("global", threshold=1322 * 2**-8 + 2**-9, max_patch_bytes=32)


def train_kept(out: str, steps: int) -> None:
    """Train in a process of its own, to a step; the run ends at 4."""
    ENTROPY_FLAVORS[FLAVOR] = ENTROPY_ARGS
    train(
        out,
        *("--model.name=blt_entropy", f"--model.flavor={FLAVOR}", "--training.dataset_path=data", "--data.streams=2"),
        *("--data.segment_bytes=32", "--data.segment_patches=32", "--patching.rule=byte"),
        *("--patching.max_patch_bytes=32", "--training.seq_len=64", "--training.local_batch_size=1"),
        *("--training.global_batch_size=2", f"--training.steps={steps}", "--training.dataloader.num_workers=0"),
        *("--metrics.log_freq=1", "--metrics.no-enable-tensorboard", "--validation.no-enable"),
        *("--checkpoint.interval=2", "--lr_scheduler.warmup_steps=1", "--lr_scheduler.total_steps=4"),
    )


def go_on(folder: Path) -> list[float]:
    """Train the run in a folder from step 2 to 4; return the losses of steps 3 and 4 in nats."""
    run_distributed(_train_in, 1, str(folder), 4)
    by_step = losses(folder / "run")
    return [by_step[3], by_step[4]]


def computed(folder: Path) -> dict[str, Any]:
    """Return what the two models give of the prompt: entropies in nats, patches, last logits, and a text."""
    loaded = load_for_inference(folder / "blt", entropy=folder / "run" / "checkpoint" / "step-2")
    assert loaded.entropy_model is not None
    ids = np.concatenate([[BOS_ID], bytes_to_ids(PROMPT)])
    entropies = EntropyScorer(loaded.entropy_model, lanes=1).score(ids)
    starts = loaded.rule.mark(ids, loaded.rule.rounded(entropies), include_next=True)
    lengths = starts_to_lengths(starts)
    with torch.no_grad():
        logits_1SV = loaded.model.logits(torch.tensor(ids)[None], torch.tensor(lengths)[None])
    text = generate(
        loaded.model, PROMPT, rule=loaded.rule, entropy_model=loaded.entropy_model, max_bytes=24, temperature=0
    )
    return {
        "entropies_nats": entropies.tolist(),
        "patch_lengths": lengths.tolist(),
        "logits": logits_1SV[0, -1, ::20].tolist(),
        "continuation": list(text),
    }


def _train_in(folder: str, steps: int) -> None:
    os.chdir(folder)
    train_kept("run", steps)


def main(archive: Path) -> None:
    """Write everything that is kept."""
    archive = archive.resolve()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as copy:
        os.chdir(folder)
        write(Path())
        expected = computed(Path())
        shutil.copytree(".", copy, dirs_exist_ok=True)
        expected["losses_nats"] = go_on(Path(copy))
        Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        with tarfile.open(archive, "w:xz") as file:
            for path in sorted(Path().rglob("*")):
                if path.is_file():
                    file.add(path, filter=_anonymous)
        os.chdir("/")


def write(folder: Path) -> None:
    """Write data, run and BLT into the working directory."""
    texts = folder / "text"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(TEXT[number:])
    prepare([texts], folder / "data", validation_fraction=0, seed=0, record_batch_bytes=256, progress=False)
    shutil.rmtree(texts)
    manifest = folder / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(texts.resolve()), "text"))
    run_distributed(_train_in, 1, str(folder), 2)
    for path in (folder / "run").iterdir():
        if path.name != "checkpoint":
            path.unlink()
    model = BLT(BLT_ARGS)
    model.init_weights()
    entropies = fingerprint_of(sidecar_settings(load_entropy_model(folder / "run"), RULE.storage, "float32"))
    write_checkpoint(model, "blt", BLT_ARGS, folder / "blt", rule=RULE, entropies=entropies)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    main(Path(sys.argv[1]))
