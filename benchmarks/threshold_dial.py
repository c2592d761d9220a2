"""Measure what a trained model gains and loses where patches begin at other thresholds.

    python -m benchmarks.threshold_dial --model blt-demo --data outputs/demo/data \\
        --out benchmarks/results/threshold_dial.json

Bits per byte over the held-out documents, once for each threshold; bytes generated in a second, 512 after a prompt of
256, batch 1, thresholds alternating, medians.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.result_file import write_result
from blt_titan.bench.generation import PROMPT, time_ours
from blt_titan.data.prepare.documents import read_documents
from blt_titan.evaluation.documents import evaluate_documents
from blt_titan.hf.load import load_for_inference
from blt_titan.inference.likelihood import LikelihoodScorer


def quality(directory: Path, data: Path, threshold: float) -> dict[str, Any]:
    """Evaluate on the held-out documents of a directory of shards."""
    loaded = load_for_inference(directory, threshold=threshold)
    scorer = LikelihoodScorer(loaded.model, loaded.rule, loaded.entropy_model)
    [scores] = evaluate_documents(scorer, read_documents(data, split="validation")).values()
    summary = scores.summary()
    return {
        key: summary[key] for key in ("bits_per_byte", "bits_per_byte_95", "documents", "bytes", "mean_patch_bytes")
    }


def speed(directory: Path, threshold: float) -> float:
    """Generate; return bytes a second, the prompt's time included."""
    loaded = load_for_inference(directory, threshold=threshold)
    run = time_ours((loaded.model, loaded.entropy_model, loaded.rule), PROMPT[:256], 512)
    return run["bytes"] / run["seconds"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model directory")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="shards with held-out documents")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1.8, 2.6220703125, 3.4], help="%(default)s")
    parser.add_argument("--repetitions", type=int, default=3, help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    speeds: dict[float, list[float]] = {threshold: [] for threshold in args.thresholds}
    for _ in range(args.repetitions):
        for threshold, found in speeds.items():
            found.append(speed(args.model, threshold))
    figures = {}
    for threshold, found in speeds.items():
        figures[str(threshold)] = {
            **quality(args.model, args.data, threshold),
            "generated_bytes_per_s": statistics.median(found),
        }
        print(f"threshold {threshold}: {figures[str(threshold)]}", flush=True)
    write_result(args.out, "threshold_dial", arguments, by_threshold=figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
