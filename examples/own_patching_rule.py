"""A patching rule of one's own, end to end: register it, train with it, cut texts, generate and evaluate.

From the repository:

    python examples/own_patching_rule.py --out outputs/syllables

The rule ends a patch after a syllable, roughly: after a vowel that follows a consonant, and at what is no letter.
Every process that meets its name imports this module: a run by its key `experimental.custom_import`, a command by
`--import examples.own_patching_rule`, a script of yours as any other module.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from blt_titan import BLT, Patcher, generate
from blt_titan.byte_vocab import BYTE_OFFSET
from blt_titan.patching.registry import register_rule
from blt_titan.patching.rule import PatchRule

LETTERS, VOWELS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", b"aeiouyAEIOUY"


def syllables(rule: PatchRule, ids: np.ndarray, entropies_nats: np.ndarray | None) -> np.ndarray:
    """Mark where a patch ends, bool [N]: a position looks at itself and at the one before, at none that follows."""
    letter, vowel = (np.isin(ids - BYTE_OFFSET, list(some)) for some in (LETTERS, VOWELS))
    after_consonant = np.concatenate([[False], (letter & ~vowel)[:-1]])
    return ~letter | (vowel & after_consonant)


register_rule("syllables", syllables)


def blt_titan(*arguments: str) -> None:
    """Run a verb of the command line."""
    subprocess.run([sys.executable, "-m", "blt_titan", *arguments], check=True)


def main() -> None:
    """Prepare, train, cut, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for data and run")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    data, run = f"{args.out}/data", f"{args.out}/run"
    blt_titan(
        "prepare", "--source", "python-stdlib", "--max-bytes", "1MB", "--record-batch-bytes", "8KiB", "--out", data
    )
    blt_titan(
        *("train", "debug", f"--training.dataset_path={data}", f"--job.dump_folder={run}"),
        *("--experimental.custom_import=examples.own_patching_rule", "--patching.rule=syllables"),
        *("--patching.max_patch_bytes=64", "--data.segment_patches=256", "--data.streams=12"),
        *(f"--training.steps={args.steps}", "--lr_scheduler.warmup_steps=1", "--metrics.no-enable-tensorboard"),
    )
    model = BLT.from_pretrained(run)  # its checkpoint names the rule
    print(Patcher.from_pretrained(run).patches("def read_documents(path):"))
    print(generate(model, "def read_documents(path):", max_bytes=80))
    blt_titan("evaluate", "--model", run, "--data", __file__, "--as-text", "--import", "examples.own_patching_rule")


if __name__ == "__main__":
    main()
