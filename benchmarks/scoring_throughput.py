"""Compare scoring in lanes with the plain scorer: one document at a time, cut and padded to 8,192 bytes.

    python -m benchmarks.scoring_throughput --out benchmarks/results/scoring_throughput.json

Three sets of documents: random words of mean 500 bytes, the same of mean 5 KB, and the standard library's sources. Both
ways score the same documents with the same model, in alternating measurements; figures are medians. What lanes can win
is what the plain way pads, so the measure is the speed-up over its padded slots per real byte; the goal is 0.8.
"""

import argparse
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.result_file import write_result
from blt_titan.byte_vocab import document_ids
from blt_titan.layout import layout_without_patches
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import ENTROPY_FLAVORS
from blt_titan.scoring.entropies import CHUNK, LANES, EntropyScorer, entropy_nats

PLAIN_BYTES = 8192
GOAL = 0.8


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


def seconds_of(work: Callable[[list[np.ndarray]], object], documents: list[np.ndarray]) -> float:
    began = time.perf_counter()
    work(documents)
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", choices=ENTROPY_FLAVORS, default="debug", help="default %(default)s")
    parser.add_argument("--kilobytes", type=int, default=150, help="of each set (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each way (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    plain, in_lanes = (EntropyModel(ENTROPY_FLAVORS[args.flavor]).to(args.device).eval() for _ in range(2))
    with torch.no_grad():
        plain.init_weights()
        in_lanes.init_weights()
    scorer = EntropyScorer(in_lanes)
    results = {}
    print(f"{'':<18}{'plain B/s':>12}{'lanes B/s':>12}{'speed-up':>10}{'slots/byte':>12}{'share of it':>12}")
    for name, documents in document_sets(args.kilobytes * 1000).items():
        n_ids = sum(map(len, documents))
        seconds: dict[str, list[float]] = {"plain": [], "lanes": []}
        for _ in tqdm(range(args.repetitions), desc=name, leave=False):
            seconds["plain"].append(seconds_of(lambda docs: score_plainly(plain, docs), documents))
            seconds["lanes"].append(seconds_of(lambda docs: list(scorer.score_all(enumerate(docs))), documents))
        medians = {way: statistics.median(measured) for way, measured in seconds.items()}
        slots_per_byte = plain_slots(documents) / n_ids
        speed_up = medians["plain"] / medians["lanes"]
        results[name] = {
            "documents": len(documents),
            "bytes": n_ids,
            "seconds": seconds,
            "bytes_per_s": {way: n_ids / median for way, median in medians.items()},
            "speed_up": speed_up,
            "plain_slots_per_byte": slots_per_byte,
            "share_of_possible": speed_up / slots_per_byte,
        }
        rates = results[name]["bytes_per_s"]
        print(
            f"{name:<18}{rates['plain']:>12,.0f}{rates['lanes']:>12,.0f}{speed_up:>10.2f}{slots_per_byte:>12.2f}"
            f"{speed_up / slots_per_byte:>12.2f}"
        )
    figures = {
        "device": args.device,
        "flavor": args.flavor,
        "lanes": LANES,
        "chunk": CHUNK,
        "goal_share_of_possible": GOAL,
        "sets": results,
    }
    write_result(args.out, "scoring_throughput", arguments, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
