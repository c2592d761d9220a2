"""Measure cached generation: against `transformers`, against what the machine could do, and over lengths.

    python -m benchmarks.generation --out benchmarks/results/generation.json

Random weights, the same on both sides, the 100M entropy model inside; a prompt of 256 bytes and 256 more, batch 1.
What a step must at least take is the longer of its FLOPs at the measured rate of matrix products and of its bytes of
weights and caches at the measured bandwidth of memory. All of it in one run, ways alternating, medians. The exit
code is 1 where a goal is missed.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result_file import write_result
from blt_titan import BLT, ByteTokenizer, EntropyModel
from blt_titan.byte_vocab import EOS_ID
from blt_titan.hf.verify.verify import TEXT
from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.caches import GROWTH_SLOTS
from blt_titan.inference.sample import Sampling, sample_steps
from blt_titan.model.flavors import BLT_FLAVORS, ENTROPY_FLAVORS
from blt_titan.patching.rule import PatchRule

PROMPT = (TEXT * 10).encode()
ONCE_A_PATCH = re.compile(
    r"^layers\.|^encoder\.(patch_projection|cross_attention|global_projection)|^decoder\.patch_projection"
    r"|^decoder\.cross_attention\.\d+\.(wk|wv|kv_norm)"
)
GOAL_TIMES_TRANSFORMERS, GOAL_TIMES_BOUND, GOAL_FLAT = 10, 3, 1.25
"""Goals for the 100M; and how much more a byte may cost after 4,096 than after 256."""


def models_of(flavor: str, patch_bytes: float) -> tuple[BLT, EntropyModel, PatchRule]:
    """Return random models and a threshold at which generated text has about this patch size."""
    model = BLT(replace(BLT_FLAVORS[flavor], init_seed=1))
    entropy_model = EntropyModel(replace(ENTROPY_FLAVORS["100M"], init_seed=2))
    with torch.no_grad():
        model.init_weights()
        entropy_model.init_weights()
        entropy_model.output.weight *= 3  # not indifferent
    probe = CachedBLT(model, PatchRule("global", threshold=0.0, max_patch_bytes=512), entropy_model)
    seen = []
    original = probe.entropies.step

    def watch(*args):
        seen.append(original(*args))
        return seen[-1]

    probe.entropies.step = watch
    for step in sample_steps(probe, [PROMPT[:64]], max_bytes=300, sampling=Sampling(seed=0)):
        assert step
    threshold = float(torch.cat(seen).quantile(1 - 1 / patch_bytes))
    return model.eval(), entropy_model.eval(), PatchRule("global", threshold=threshold, max_patch_bytes=512)


def time_ours(models: tuple[BLT, EntropyModel, PatchRule], prompt: bytes, max_bytes: int) -> dict[str, Any]:
    """Generate once, passing over the end of a text; return seconds of the prompt and of each further byte."""
    model, entropy_model, rule = models
    generator, sampling = CachedBLT(model, rule, entropy_model), Sampling()
    draw = torch.Generator().manual_seed(3)
    marks = [time.perf_counter()]
    logits_BV = generator.prefill([np.array(ByteTokenizer().encode(prompt))])
    for _ in range(max_bytes):
        p_V = sampling.probabilities(logits_BV)[0]
        p_V[EOS_ID] = 0
        marks.append(time.perf_counter())
        logits_BV = generator.step(torch.multinomial(p_V, 1, generator=draw).numpy())
    marks.append(time.perf_counter())
    figures = {
        "seconds": marks[-1] - marks[0],
        "prefill_s": marks[1] - marks[0],
        "step_s": float(np.median(np.diff(marks[1:]))),
        "steps_s": np.diff(marks[1:]),
        "mean_patch_bytes": (len(prompt) + max_bytes) / len(generator.patch_lengths()),
        "global_steps": generator.global_steps,
        "cache_bytes": generator.cache_bytes,
        "bytes": max_bytes,
    }
    return figures


def time_theirs(directory: Path, prompt: bytes, max_bytes: int) -> float:
    """Let `transformers` generate as many bytes; return seconds."""
    import transformers

    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[1, *(byte + 4 for byte in prompt)]])
    began = time.perf_counter()
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_bytes, min_new_tokens=max_bytes, do_sample=True
    )
    seconds = time.perf_counter() - began
    assert out.shape[1] == ids.shape[1] + max_bytes
    return seconds


def machine_rates() -> dict[str, float]:
    """Measure FLOPs of matrix products and bytes read by products of a matrix and a vector, each per second."""
    a = torch.randn(1536, 1536)
    big, vector = torch.randn(4096, 24_000), torch.randn(24_000)
    flops, bandwidth = [], []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        flops.append(4 * 2 * 1536**3 / (time.perf_counter() - began))
        began = time.perf_counter()
        big @ vector
        bandwidth.append(big.nbytes / (time.perf_counter() - began))
    return {"flops_per_s": statistics.median(flops), "bytes_per_s": statistics.median(bandwidth)}


def step_bound_s(models: tuple[BLT, EntropyModel, PatchRule], run: dict[str, float], rates: dict[str, float]) -> float:
    """Return the least time of a mean step: of its weights and caches, or of its FLOPs."""
    model, entropy_model, _ = models
    share = run["global_steps"] / run["bytes"]
    n_bytes = flops = 0.0
    for of_blt, module in ((True, model), (False, entropy_model)):
        for name, parameter in module.named_parameters():
            if "embed" in name:
                continue  # a few rows
            times = share if of_blt and ONCE_A_PATCH.search(name) else 1.0
            n_bytes += times * parameter.nbytes
            flops += times * 2 * parameter.numel()
    # Every cache is read whole in a step, the global one when a patch ends.
    args = model.args
    global_cache = 8 * args.global_layers * args.global_dim * GROWTH_SLOTS
    n_bytes += run["cache_bytes"] - (1 - share) * global_cache
    return max(n_bytes / rates["bytes_per_s"], flops / rates["flops_per_s"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavors", nargs="+", default=["100M", "20M"], help="default %(default)s")
    parser.add_argument("--repetitions", type=int, default=3, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"threads": args.threads}
    for flavor in args.flavors:
        models = models_of(flavor, patch_bytes=4.5)
        model, entropy_model, rule = models
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(Path(folder) / "hf", entropy_model=entropy_model, rule=rule)
            ours, theirs, rates = [], [], []
            for _ in range(args.repetitions):
                rates.append(machine_rates())
                ours.append(time_ours(models, PROMPT[:256], 256))
                theirs.append(time_theirs(Path(folder) / "hf", PROMPT[:256], 256))
        run = {key: statistics.median(one[key] for one in ours) for key in ours[0] if key != "steps_s"}
        rate = {key: statistics.median(one[key] for one in rates) for key in rates[0]}
        bound = run["prefill_s"] + run["bytes"] * step_bound_s(models, run, rate)
        figures[flavor] = {
            **run,
            **rate,
            "transformers_seconds": statistics.median(theirs),
            "times_transformers": statistics.median(theirs) / run["seconds"],
            "bound_seconds": bound,
            "times_bound": run["seconds"] / bound,
            "goal_times_transformers": GOAL_TIMES_TRANSFORMERS,
            "goal_times_bound": GOAL_TIMES_BOUND,
        }
        print(
            f"{flavor}: {run['seconds']:.2f} s ({run['bytes'] / run['seconds']:.1f} bytes/s, patches of "
            f"{run['mean_patch_bytes']:.2f}), transformers {statistics.median(theirs):.1f} s, "
            f"{figures[flavor]['times_transformers']:.1f} times; bound {bound:.2f} s: "
            f"{run['seconds'] / bound:.2f} times",
            flush=True,
        )
    models = models_of(args.flavors[0], patch_bytes=4.5)
    steps = time_ours(models, PROMPT[:256], 4096)["steps_s"]
    figures["ms_per_byte_by_length"] = {
        str(end): 1000 * float(np.mean(steps[end - 256 : end])) for end in (256, 512, 1024, 2048, 4096)
    }
    print("ms per byte, the last 256 before", figures["ms_per_byte_by_length"])
    write_result(args.out, "generation", arguments, **figures)
    missed = [
        flavor
        for flavor in args.flavors
        if flavor == "100M"
        and not (
            figures[flavor]["times_transformers"] >= GOAL_TIMES_TRANSFORMERS
            and figures[flavor]["times_bound"] <= GOAL_TIMES_BOUND
        )
    ]
    by_length = figures["ms_per_byte_by_length"]
    if by_length["4096"] > GOAL_FLAT * by_length["256"]:
        missed.append("cost flat in length")
    if missed:
        print(f"goals missed: {', '.join(missed)}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
