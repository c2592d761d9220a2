"""Suite of generation: cached generation against `transformers`, against what the machine could do, and over lengths.

Random weights, the same on both sides, the 100M entropy model inside; a prompt of 256 bytes and 256 more, batch 1.
What a step must at least take is the longer of its FLOPs at the measured rate of matrix products and of its bytes of
weights and caches at the measured bandwidth of memory. All of it in one run, ways alternating, medians.
"""

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blt_titan import BLT, ByteTokenizer, EntropyModel
from blt_titan.bench.options import Options, Suite
from blt_titan.bench.shapes import SHAPES
from blt_titan.bench.table import Table, seconds, times
from blt_titan.byte_vocab import EOS_ID
from blt_titan.hf.verify.verify import TEXT
from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.caches import GROWTH_SLOTS
from blt_titan.inference.sample import Sampling, sample_steps
from blt_titan.model.flavors import ENTROPY_FLAVORS
from blt_titan.patching.rule import PatchRule
from blt_titan.progress import ProgressBar

PROMPT = (TEXT * 10).encode()
ONCE_A_PATCH = re.compile(
    r"^layers\.|^encoder\.(patch_projection|cross_attention|global_projection)|^decoder\.patch_projection"
    r"|^decoder\.cross_attention\.\d+\.(wk|wv|kv_norm)"
)
SHAPES_MEASURED = ("100M", "20M")
N_PROMPT, N_BYTES, LONG = 256, 256, 4096
TINY_PROMPT, TINY_BYTES, TINY_LONG = 32, 12, 24
GOAL_TIMES_TRANSFORMERS, GOAL_TIMES_BOUND, GOAL_FLAT = 10, 3, 1.25
"""Goals for the 100M; and how much more a byte may cost after 4,096 than after 256."""


def models_of(
    shape: str, patch_bytes: float, *, entropy_flavor: str = "100M", device: str = "cpu"
) -> tuple[BLT, EntropyModel, PatchRule]:
    """Return random models and a threshold at which generated text has about this patch size."""
    model = BLT(replace(SHAPES[shape], init_seed=1))
    entropy_model = EntropyModel(replace(ENTROPY_FLAVORS[entropy_flavor], init_seed=2))
    with torch.no_grad():
        model.init_weights()
        entropy_model.init_weights()
        entropy_model.output.weight *= 3  # not indifferent
    model, entropy_model = model.to(device).eval(), entropy_model.to(device).eval()
    probe: Any = CachedBLT(model, PatchRule("global", threshold=0.0, max_patch_bytes=512), entropy_model)
    seen = []
    original = probe.entropies.step

    def watch(*args):
        seen.append(original(*args))
        return seen[-1]

    probe.entropies.step = watch
    for step in sample_steps(probe, [PROMPT[:64]], max_bytes=300, sampling=Sampling(seed=0)):
        assert step
    threshold = float(torch.cat(seen).quantile(1 - 1 / patch_bytes))
    return model, entropy_model, PatchRule("global", threshold=threshold, max_patch_bytes=512)


def time_ours(models: tuple[BLT, EntropyModel, PatchRule], prompt: bytes, max_bytes: int) -> dict[str, Any]:
    """Generate once, passing over the end of a text; return seconds of the prompt and of each further byte."""
    model, entropy_model, rule = models
    generator, sampling = CachedBLT(model, rule, entropy_model), Sampling()
    draw = torch.Generator().manual_seed(3)
    marks = [time.perf_counter()]
    logits_BV = generator.prefill([np.array(ByteTokenizer().encode(prompt))])
    for _ in range(max_bytes):
        p_V = sampling.probabilities(logits_BV)[0].cpu()
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


def time_theirs(directory: Path, prompt: bytes, max_bytes: int, device: str) -> float:
    """Let `transformers` generate as many bytes; return seconds."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    theirs = read(directory).to(device)
    ids = torch.tensor([[1, *(byte + 4 for byte in prompt)]], device=device)
    began = time.perf_counter()
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_bytes, min_new_tokens=max_bytes, do_sample=True
    )
    taken_s = time.perf_counter() - began
    assert out.shape[1] == ids.shape[1] + max_bytes
    return taken_s


def machine_rates(device: str) -> dict[str, float]:
    """Measure FLOPs of matrix products and bytes read by products of a matrix and a vector, each per second."""
    a = torch.randn(1536, 1536, device=device)
    big, vector = torch.randn(4096, 24_000, device=device), torch.randn(24_000, device=device)

    def seconds_of(work: Callable[[], torch.Tensor], times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            result = work()
        result[0].sum().item()  # waits for a GPU
        return (time.perf_counter() - began) / times

    flops = [2 * 1536**3 / seconds_of(lambda: a @ a, 4) for _ in range(7)]
    bandwidth = [big.nbytes / seconds_of(lambda: big @ vector, 4) for _ in range(7)]
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
            often = share if of_blt and ONCE_A_PATCH.search(name) else 1.0
            n_bytes += often * parameter.nbytes
            flops += often * 2 * parameter.numel()
    # Every cache is read whole in a step, the global one when a patch ends.
    args = model.args
    global_cache = 8 * args.global_layers * args.global_dim * GROWTH_SLOTS
    n_bytes += run["cache_bytes"] - (1 - share) * global_cache
    return max(n_bytes / rates["bytes_per_s"], flops / rates["flops_per_s"])


def measure_shape(shape: str, options: Options) -> dict[str, Any]:
    """Measure one shape against `transformers` and against its bound."""
    n_prompt, n_bytes = (TINY_PROMPT, TINY_BYTES) if options.tiny else (N_PROMPT, N_BYTES)
    models = models_of(shape, 4.5, entropy_flavor=_entropy_flavor(options), device=options.device)
    model, entropy_model, rule = models
    ours, theirs, rates = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "hf", entropy_model=entropy_model, rule=rule)
        for _ in ProgressBar(range(options.repeats), desc=shape, leave=False, disable=not options.progress):
            rates.append(machine_rates(options.device))
            ours.append(time_ours(models, PROMPT[:n_prompt], n_bytes))
            theirs.append(time_theirs(Path(folder) / "hf", PROMPT[:n_prompt], n_bytes, options.device))
    run = {key: statistics.median(one[key] for one in ours) for key in ours[0] if key != "steps_s"}
    rate = {key: statistics.median(one[key] for one in rates) for key in rates[0]}
    bound_s = run["prefill_s"] + run["bytes"] * step_bound_s(models, run, rate)
    return {
        **run,
        **rate,
        "median_s": run["seconds"],
        "transformers_median_s": statistics.median(theirs),
        "times_transformers": statistics.median(theirs) / run["seconds"],
        "bound_s": bound_s,
        "times_bound": run["seconds"] / bound_s,
    }


def generation(options: Options) -> dict[str, Any]:
    """Measure all shapes, and the first one over lengths."""
    torch.set_num_threads(options.threads)
    if options.tiny:
        shapes, long = ["tiny"], TINY_LONG
    else:
        shapes, long = list(SHAPES_MEASURED) if options.shape == "bench" else [options.shape], LONG
    found = {shape: measure_shape(shape, options) for shape in shapes}
    models = models_of(shapes[0], 4.5, entropy_flavor=_entropy_flavor(options), device=options.device)
    n_prompt = TINY_PROMPT if options.tiny else N_PROMPT
    steps_s, span = time_ours(models, PROMPT[:n_prompt], long)["steps_s"], long // 16
    by_length = {
        str(end): 1000 * float(np.mean(steps_s[end - span : end])) for end in (long // 16, long // 4, long // 2, long)
    }
    return {
        "settings": options.settings(),
        "goals": {"times_transformers": GOAL_TIMES_TRANSFORMERS, "times_bound": GOAL_TIMES_BOUND, "flat": GOAL_FLAT},
        "shapes": found,
        "ms_per_byte_by_length": by_length,
    }


def _entropy_flavor(options: Options) -> str:
    return "debug" if options.tiny else "100M"


def generation_table(result: dict[str, Any]) -> Table:
    """Show times, and how they compare."""
    rows = [
        [
            shape,
            seconds(found["median_s"]),
            f"{found['bytes'] / found['median_s']:.1f}",
            f"{found['mean_patch_bytes']:.2f}",
            seconds(found["transformers_median_s"]),
            times(found["times_transformers"]),
            seconds(found["bound_s"]),
            times(found["times_bound"]),
        ]
        for shape, found in result["shapes"].items()
    ]
    header = ["model", "ours", "bytes/s", "patch", "transformers", "/ ours", "bound", "ours / bound"]
    return Table(f"cached generation, batch 1, medians of {result['settings']['repeats']}", header, rows)


SUITE = Suite("cached generation against transformers and the machine's bound", generation, generation_table)
