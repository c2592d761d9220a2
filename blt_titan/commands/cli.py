"""The command `blt-titan`: finds the module of a verb and calls it.

A verb is a module of this package with `main(argv) -> int`. It is imported when it is called, so that `--help` needs
none of torch.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from blt_titan.commands.ending import command, end_quietly_while_importing

PROGRAM = "blt-titan"
VERBS = {
    "prepare": ("prepare", "text to byte shards, in a global random order"),
    "inspect": ("inspect", "show what byte shards hold, and check every byte"),
    "score": ("score", "entropies of byte shards by an entropy model"),
    "calibrate": ("calibrate", "the threshold for a wanted patch size"),
    "view": ("view", "a page that shows where patches begin"),
    "train": ("train", "train a model, on one process or many"),
    "status": ("status", "how a run stands, live or dead, and why it ended"),
    "config": ("config", "print the settings of a run, or check them"),
    "checkpoint": ("checkpoint", "list, verify, prune or roll back the checkpoints of a run"),
    "export": ("export", "a checkpoint to a Hugging Face directory"),
    "import": ("import_", "a Hugging Face directory to a checkpoint"),
    "generate": ("generate", "continue prompts"),
    "evaluate": ("evaluate", "bits per byte of documents"),
    "harness": ("harness", "tasks of EleutherAI's evaluation harness"),
    "bench": ("bench", "measure this code beside its peers, on this machine"),
    "plots": ("plots", "serve a page with the curves of all runs"),
    "demo": ("demo", "from text to a trained BLT, in about ten minutes on two CPU cores"),
    "slurm": ("slurm", "a Slurm batch script that trains on several nodes and is queued again"),
    "plan": ("plan", "what a run takes on so many GPUs: memory, traffic, time, money; the best layouts"),
    "simulate": ("simulate", "the data of a run on so many GPUs, a resume on others, and failures, without a GPU"),
    "check-cuda": ("check_cuda", "one step on CUDA without a GPU: memory, host reads, kernels, time"),
    "doctor": ("doctor", "versions, devices, and what is missing for what"),
}
"""Verb: its module in this package, and what it does in a line."""


def usage() -> str:
    """Return what `blt-titan --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [options]",
            "",
            "Train Byte Latent Transformers: from raw text to a model that writes.",
            "",
            *lines,
            "",
            f"{PROGRAM} VERB --help says what a verb takes; {PROGRAM} --version the version.",
            f"Begin with: {PROGRAM} demo",
        ]
    )


@command(PROGRAM)
def _show(lines: Sequence[str]) -> int:
    print(*lines, sep="\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; give its exit code: 0 done, 1 the work failed, 2 asked wrongly, 130 stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _show([usage()])
    if arguments[0] in ("-V", "--version", "version"):
        return _show([f"{PROGRAM} {version('blt_titan')}"])
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        print(f"{PROGRAM}: error: no verb {verb!r}{meant} There are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    end_quietly_while_importing(f"{PROGRAM} {verb}")
    return importlib.import_module(f"blt_titan.commands.{VERBS[verb][0]}").main(rest)
