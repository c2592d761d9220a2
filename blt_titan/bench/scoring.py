"""Suite of scoring: lanes, against the plain scorer, which takes one document at a time, cut and padded to 8,192 bytes.

Three sets of documents: random words of mean 500 bytes, the same of mean 5 KB, and the standard library's sources. Both
ways score the same documents with the same model, in alternating measurements; figures are medians. What lanes can win
is what the plain way pads, so the measure is the speed-up over its padded slots per real byte; the goal is 0.8.
"""

import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blt_titan.bench.options import Options, Suite
from blt_titan.bench.table import Table, times
from blt_titan.byte_vocab import document_ids
from blt_titan.layout import layout_without_patches
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import ENTROPY_FLAVORS
from blt_titan.progress import ProgressBar
from blt_titan.scoring.entropies import CHUNK, LANES, EntropyScorer, entropy_nats

PLAIN_BYTES = 8192
GOAL = 0.8
FLAVOR = "debug"
SET_BYTES, TINY_SET_BYTES = 400_000, 12_000


def document_sets(total_bytes: int) -> dict[str, list[np.ndarray]]:
    """Return the sets as ids, each of about `total_bytes`."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=n)) for n in rng.integers(1, 10, size=5000)]

    def of_mean(mean: int) -> list[np.ndarray]:
        sizes = 1 + rng.exponential(mean, size=total_bytes // mean).astype(int)
        return [document_ids(b" ".join(words[i] for i in rng.integers(5000, size=n // 6 + 1))[:n]) for n in sizes]

    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    library, left = [], total_bytes
    for path in rng.permutation(np.array(paths, dtype=object)):
        if left > 0 and (text := path.read_bytes()):
            library.append(document_ids(text))
            left -= len(text)
    return {"mean 500 B": of_mean(500), "mean 5 KB": of_mean(5000), "standard library": library}


def plain_slots(documents: list[np.ndarray]) -> int:
    """Count the slots of the plain way, padding included."""
    return sum(-(-len(ids) // PLAIN_BYTES) * PLAIN_BYTES for ids in documents)


@torch.no_grad()
def score_plainly(model: EntropyModel, documents: list[np.ndarray]) -> None:
    """Score one row of 8,192 slots after the other."""
    pos = torch.arange(PLAIN_BYTES)[None]
    device = model.tok_embeddings.weight.device
    for ids in documents:
        for begin in range(0, len(ids), PLAIN_BYTES):
            part = torch.from_numpy(ids[begin : begin + PLAIN_BYTES].astype(np.int64))
            row = torch.nn.functional.pad(part, (0, PLAIN_BYTES - len(part)))[None].to(device)
            doc = torch.where(pos < len(part), 0, -1).to(device)
            entropy_nats(model(row, layout_without_patches(doc))).cpu()


def seconds_of(work: Callable[[list[np.ndarray]], object], documents: list[np.ndarray], device: str) -> float:
    """Return the processor time of some work on a CPU, the time by the clock on a GPU; the work ends with a copy."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    work(documents)
    return clock() - began


def scoring(options: Options) -> dict[str, Any]:
    """Measure both ways on all sets."""
    torch.set_num_threads(options.threads)
    plain, in_lanes = (EntropyModel(ENTROPY_FLAVORS[FLAVOR]).to(options.device).eval() for _ in range(2))
    with torch.no_grad():
        plain.init_weights()
        in_lanes.init_weights()
    scorer = EntropyScorer(in_lanes)
    ways: dict[str, Callable[[list[np.ndarray]], object]] = {
        "plain": lambda documents: score_plainly(plain, documents),
        "lanes": lambda documents: list(scorer.score_all(enumerate(documents))),
    }
    sets = {}
    for name, documents in document_sets(TINY_SET_BYTES if options.tiny else SET_BYTES).items():
        n_ids = sum(map(len, documents))
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in ProgressBar(range(options.repeats), desc=name, leave=False, disable=not options.progress):
            for way, work in ways.items():
                taken[way].append(seconds_of(work, documents, options.device))
        medians = {way: statistics.median(measured) for way, measured in taken.items()}
        slots_per_byte = plain_slots(documents) / n_ids
        speed_up = medians["plain"] / medians["lanes"]
        sets[name] = {
            "documents": len(documents),
            "bytes": n_ids,
            "seconds": taken,
            "median_s": medians,
            "bytes_per_s": {way: n_ids / median for way, median in medians.items()},
            "speed_up": speed_up,
            "plain_slots_per_byte": slots_per_byte,
            "share_of_possible": speed_up / slots_per_byte,
        }
    settings = options.settings() | {"shape": f"entropy {FLAVOR}", "lanes": LANES, "chunk": CHUNK}
    return {"settings": settings, "goal_share_of_possible": GOAL, "sets": sets}


def scoring_table(result: dict[str, Any]) -> Table:
    """Show rates and speed-ups."""
    rows = [
        [
            name,
            f"{found['bytes_per_s']['plain']:,.0f}",
            f"{found['bytes_per_s']['lanes']:,.0f}",
            times(found["speed_up"]),
            f"{found['plain_slots_per_byte']:.2f}",
            f"{found['share_of_possible']:.2f}",
        ]
        for name, found in result["sets"].items()
    ]
    header = ["documents", "plain bytes/s", "lanes bytes/s", "speed-up", "padded slots per byte", "share of it"]
    return Table(f"scoring, {result['settings']['shape']}", header, rows)


SUITE = Suite("entropies in lanes, against one padded document at a time", scoring, scoring_table)
