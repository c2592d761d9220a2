"""Stages of what comes after and before training: entropies of data, and cached generation."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from blt_titan.bench.generation import PROMPT, models_of, time_ours
from blt_titan.byte_vocab import document_ids
from blt_titan.gpu_check.stage import Place, Stage, attempt, ok, wait
from blt_titan.inference.cached import CachedBLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import ENTROPY_FLAVORS
from blt_titan.scoring.entropies import EntropyScorer

LANES = (8, 64, 256)
MEAN_DOCUMENT_BYTES = 5_000


def _documents(total_bytes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = 1 + rng.exponential(MEAN_DOCUMENT_BYTES, total_bytes // MEAN_DOCUMENT_BYTES + 1).astype(int)
    return [document_ids(rng.integers(97, 123, n, dtype=np.uint8).tobytes()) for n in sizes]


def _score(dtype: torch.dtype, lanes: int, place: Place) -> dict[str, Any]:
    model = EntropyModel(ENTROPY_FLAVORS["debug" if place.tiny else "100M"]).to(place.device)
    with torch.no_grad():
        model.init_weights()
    scorer = EntropyScorer(model.to(dtype).eval(), lanes=lanes)
    documents = _documents(20_000 if place.tiny else 8_000_000)
    list(scorer.score_all(enumerate(documents[:lanes])))  # compiles
    wait(place)
    began = time.perf_counter()
    list(scorer.score_all(enumerate(documents)))
    seconds, n_bytes = time.perf_counter() - began, sum(map(len, documents))
    return {"seconds": seconds, "bytes": n_bytes, "bytes_per_s": n_bytes / seconds}


def scoring(place: Place) -> Iterator[dict[str, Any]]:
    """Score documents of mean 5 KB with the 100M entropy model."""
    parts: dict[str, dict[str, Any]] = {}
    for lanes in LANES[:1] if place.tiny else LANES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{str(dtype).removeprefix('torch.')}_{lanes}_lanes"
            parts[name] = attempt(lambda d=dtype, n=lanes: _score(d, n, place), place)
            yield {"ok": ok(parts), "scoring": parts}


def _generate(shape: str, place: Place) -> dict[str, Any]:
    models = models_of(
        "tiny" if place.tiny else shape, 4.5, entropy_flavor="debug" if place.tiny else "100M", device=place.device
    )
    n_prompt, n_bytes = (32, 8) if place.tiny else (256, 512)
    found = [time_ours(models, PROMPT[:n_prompt], n_bytes) for _ in range(2)][-1]  # the first one warms up
    figures = {key: value for key, value in found.items() if key != "steps_s"}
    return figures | {"bytes_per_s": n_bytes / found["seconds"]}


def generation(place: Place) -> Iterator[dict[str, Any]]:
    """Generate byte after byte, batch 1, as this code can."""
    parts: dict[str, dict[str, Any]] = {}
    for shape in ("20M", "100M"):
        parts[shape] = attempt(lambda shape=shape: _generate(shape, place), place)
        yield {"ok": ok(parts), "generation": parts}
    if not hasattr(CachedBLT, "capture"):
        parts["cuda_graphs"] = {"skipped": "cached generation captures no CUDA graphs in this code"}
    yield {"ok": ok(parts), "generation": parts}


STAGES = {
    "scoring": Stage("entropies by the 100M entropy model: number formats, lanes", scoring),
    "generation": Stage("cached generation, batch 1; with CUDA graphs where this code captures them", generation),
}
