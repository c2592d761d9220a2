r"""Choose the threshold of a patching rule for a wanted patch size, and the segment that wastes least.

    blt-titan calibrate --data data/web --target-patch-bytes 4.5
    blt-titan calibrate --data data/web --target-patch-bytes 6 --rule monotonic --png patches.png

Reads the entropies that `blt-titan score` made. Prints how long patches get, what segments of 256 to 4,096
patches waste at their best byte budget, and the lines to paste into a run's TOML.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np

from blt_titan.commands.arguments import (
    MOST_PATCH_BYTES,
    NATS,
    SIZES,
    Parser,
    existing_directory,
    number,
    output_file,
    plain,
    png_file,
    size_from,
    whole,
    write_output,
    writing,
)
from blt_titan.commands.ending import command
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import EntropySidecar
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.patching import EntropyRule
from blt_titan.scoring.calibration import (
    SEGMENT_PATCHES,
    Calibration,
    SegmentBudget,
    best_budgets,
    calibrate,
    histogram_text,
    read_sample,
)

CONTEXT_BYTES = 16_384
TOLERANCE = 0.005
"""How far the mean patch may be from the one that was asked for, as a share of it."""

NAME = "blt-titan calibrate"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} --data DIR --target-patch-bytes N [options]", epilog=SIZES)
    _add_data(parser.add_argument_group("what to read"))
    _add_rule(parser.add_argument_group("the patches that are wanted"))
    _add_model(parser.add_argument_group("the run that will read them"))
    add = parser.add_argument_group("results").add_argument
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        help="also write the distribution; as patch_lengths.json in a run's folder, `blt-titan plots` shows it",
    )
    add("--png", type=png_file, metavar="FILE", help="also draw the distribution and the trade-off")
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=existing_directory,
        required=True,
        metavar="DIR",
        help="byte shards with a sidecar of entropies, as `blt-titan score` writes them",
    )
    group.add_argument(
        "--name", type=plain, default="default", help="name of the sidecar, in DIR/entropies (default %(default)s)"
    )
    group.add_argument(
        "--split", choices=["train", "validation"], default="train", help="which split of DIR (default %(default)s)"
    )
    group.add_argument(
        "--sample-bytes",
        type=size_from(1),
        default=64_000_000,
        metavar="SIZE",
        help="how much text is looked at (default 64MB)",
    )


def _add_rule(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target-patch-bytes",
        type=number(1, 10**6, above_least=True),
        required=True,
        metavar="N",
        help="wanted mean length of a patch, in bytes",
    )
    group.add_argument(
        "--rule",
        choices=get_args(EntropyRule),
        default="global",
        help="what begins a patch: an entropy above a threshold, a rise of the entropy (monotonic), both (add), or the "
        "highest entropies of a text (topk) (default %(default)s)",
    )
    group.add_argument(
        "--threshold-add", type=NATS, metavar="NATS", help="the rise that the rule 'add' asks for, in nats (default 0)"
    )
    group.add_argument(
        "--max-patch-bytes",
        type=whole(2, MOST_PATCH_BYTES),
        default=512,
        metavar="N",
        help="bytes of the longest patch; longer ones are split (default %(default)s)",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--segment-patches",
        type=whole(2, 2**20),
        default=512,
        metavar="N",
        help="patch slots of a segment in the lines to paste (default %(default)s)",
    )
    group.add_argument(
        "--flavor", choices=BLT_FLAVORS, default="1B", help="model whose compute is weighed (default %(default)s)"
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, DataError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    if args.rule == "topk" and not args.target_patch_bytes.is_integer():
        raise DataError(f"--target-patch-bytes {args.target_patch_bytes:g}: rule topk takes whole numbers")
    if args.rule != "add" and args.threshold_add is not None:
        raise DataError(f"--threshold-add {args.threshold_add:g}: rule {args.rule} has none; --rule add has")
    if args.png and find_spec("matplotlib") is None:
        raise DataError("--png needs matplotlib: pip install 'blt_titan[demo]'")
    shards = ShardSet(args.data, args.split)
    sample = read_sample(shards, EntropySidecar(args.data, args.name, shards), sample_bytes=args.sample_bytes)
    calibration = calibrate(
        sample,
        args.target_patch_bytes,
        rule=args.rule,
        threshold_add=(args.threshold_add or 0.0) if args.rule == "add" else None,
        max_patch_bytes=args.max_patch_bytes,
    )
    mean = calibration.mean_patch_bytes
    flavor = BLT_FLAVORS[args.flavor]
    parts = flavor.flops_by_part(CONTEXT_BYTES, mean)
    budgets = best_budgets(
        calibration.lengths,
        cost_of_byte=parts.encoder + parts.decoder,
        cost_of_patch=flavor.global_layers * parts.global_layer * mean,
        longest_patch=args.max_patch_bytes,
        segment_patches=sorted({*SEGMENT_PATCHES, args.segment_patches}),
    )
    if args.segment_patches not in [budget.patches for budget in budgets]:
        raise DataError(
            f"--segment-patches {args.segment_patches}: the sample has only {len(calibration.lengths):,} patches, "
            "which must fill a segment of at least two"
        )
    _report(args, calibration, budgets, n_ids=len(sample.entropies_nats))
    if args.json:
        write_output(args.json, json.dumps(calibration.distribution()) + "\n")
        print(f"\n{args.json}: the distribution")
    if args.png:
        with writing(args.png):
            _draw(args.png, calibration, budgets)
        print(f"\n{args.png}: the distribution and the trade-off")
    return 0


def _why_not(args: argparse.Namespace, calibration: Calibration) -> str:
    if abs(calibration.mean_patch_bytes / args.target_patch_bytes - 1) <= TOLERANCE or calibration.rule == "topk":
        return ""
    return "; what is stored allows no nearer threshold: uint8 codes are 3.5% apart, float16 values 0.1%"


def _report(args: argparse.Namespace, calibration: Calibration, budgets: list[SegmentBudget], *, n_ids: int) -> None:
    lengths, mean = calibration.lengths, calibration.mean_patch_bytes
    percentiles = ", ".join(f"{p}% {int(np.percentile(lengths, p))}" for p in (50, 90, 99))
    print(
        f"rule {calibration.rule}: {len(lengths):,} patches of {mean:.3f} bytes on average in {n_ids:,} bytes "
        f"(wanted {args.target_patch_bytes:g}{_why_not(args, calibration)})\n"
        f"lengths up to: {percentiles}, all {lengths.max()}; {calibration.cut_by_limit / len(lengths):.3%} begin only "
        f"because {args.max_patch_bytes} bytes were full\n\n{histogram_text(lengths)}\n\n"
        f"segments, {args.flavor}: patches, best bytes, padded patch slots, padded byte slots, padded compute"
    )
    for budget in budgets:
        print(
            f"  {budget.patches:>5} {budget.bytes:>7} {budget.padded_patches:8.1%} {budget.padded_bytes:8.1%} "
            f"{budget.padded_compute:8.1%}"
        )
    if calibration.rule == "topk":
        print("\nrule topk looks at whole documents: it is for analysis, and no run can use it")
        return
    chosen = next(budget for budget in budgets if budget.patches == args.segment_patches)
    add = f"threshold_add = {calibration.threshold_add}\n" if calibration.threshold_add is not None else ""
    print(
        f'\n[patching]\nrule = "{calibration.rule}"\nthreshold = {calibration.threshold!r}\n{add}'
        f'max_patch_bytes = {args.max_patch_bytes}\nsidecar = "{args.name}"'
    )
    print(
        f"\n[data]\nsegment_bytes = {chosen.bytes}\nsegment_patches = {chosen.patches}\n\n"
        f"[training]\nseq_len = {8 * chosen.bytes}    # 8 segments"
    )


def _draw(path: Path, calibration: Calibration, budgets: list[SegmentBudget]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), dpi=120)
    left.hist(np.minimum(calibration.lengths, 32), bins=np.arange(0.5, 33.5))
    left.axvline(calibration.mean_patch_bytes, ls="--", color="black", label=f"mean {calibration.mean_patch_bytes:.2f}")
    left.set(xlabel="bytes of a patch (32: and longer)", ylabel="patches", title=f"rule {calibration.rule}")
    left.legend()
    # Side by side, not at their distances: 500 and 512 would stand on each other.
    places = range(len(budgets))
    for name, label in (
        ("padded_compute", "compute"),
        ("padded_patches", "patch slots"),
        ("padded_bytes", "byte slots"),
    ):
        right.plot(places, [100 * getattr(b, name) for b in budgets], "o-", label=label)
    right.set(xlabel="patches of a segment", ylabel="padding, %", title="at the best byte budget", ylim=0)
    right.set_xticks(places, [str(b.patches) for b in budgets])
    right.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
