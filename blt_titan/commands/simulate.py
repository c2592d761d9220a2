"""Run the data of a job on so many GPUs without any: all loaders, a save, a resume on others, and failures.

    blt-titan simulate --world-size 1024 --steps 560 --resume-on 768
    blt-titan simulate --config my.toml --world-size 64 --step-seconds 2.1 --failures 1e-4 --intervals 50 100 200

The order, the streams, the packer, the loaders of all data-parallel ranks and their state in a checkpoint are those of
a run; the text is made as it is read. Each row is compared with that of a run that never stops. Stragglers and failures
are drawn. Exit code 1 if a row was lost, repeated or moved.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from blt_titan.commands.arguments import SEED, Parser, number, size_from, whole
from blt_titan.commands.assumptions import add_gpu, add_mfu, add_storage_and_failures, of_storage_and_failures
from blt_titan.commands.ending import command
from blt_titan.commands.run_settings import config_file, parse_with_overrides, run_arguments, shipped_configs
from blt_titan.config.check import RunConfigError, load_run_config
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import RECORD_BATCH_BYTES
from blt_titan.plan.network import NETWORKS
from blt_titan.plan.plan import Assumptions
from blt_titan.simulate.report import report
from blt_titan.simulate.simulate import Ask, default_workers, simulate

NAME = "blt-titan simulate"
_CONFIG = "blt_8b_1024"
_TEXT_BYTES = 4_500_000_000_000


def make_parser() -> Parser:
    """Return what parses the command line, but for the overrides."""
    usage = f"{NAME} --world-size N [options] [--section.key=value ...]"
    parser = Parser(NAME, __doc__, usage=usage, allow_abbrev=False)
    what = parser.add_argument_group("what is simulated")
    what.add_argument(
        "--config",
        type=config_file,
        default=_CONFIG,
        metavar="CONFIG",
        help=f"the run's TOML: a file, or one of {', '.join(shipped_configs())} (default {_CONFIG})",
    )
    add = what.add_argument
    add("--world-size", type=whole(1, 10**6), required=True, metavar="N", help="GPUs of the whole job")
    add(
        "--steps",
        type=whole(2, 10**9),
        metavar="N",
        help="steps whose rows are made (default: a row of each stream before the save and one after it)",
    )
    add("--resume-on", type=whole(1, 10**6), metavar="N", help="GPUs that go on after the save (default: as many)")
    add("--resume-at", type=whole(1, 10**9), metavar="STEP", help="step that is saved (default: about the middle)")
    add(
        "--text",
        type=size_from(10**6),
        default=_TEXT_BYTES,
        metavar="SIZE",
        help="text of all data sets together (default 4.5TB)",
    )
    add(
        "--record-batch-bytes",
        type=size_from(4096, 2**24),
        default=RECORD_BATCH_BYTES,
        metavar="SIZE",
        help="most text of a record batch (default 256KiB)",
    )
    _add_assumptions(parser)
    drawn = parser.add_argument_group("what is drawn").add_argument
    drawn(
        "--straggle",
        type=number(0, 100),
        default=0.01,
        metavar="SHARE",
        help="mean share of a step by which a GPU is late (default 0.01)",
    )
    drawn(
        "--intervals",
        type=whole(1, 10**9),
        nargs="+",
        metavar="STEPS",
        help="steps between two saves that are tried beside Young's and Daly's (default: some around it, the own)",
    )
    drawn("--histories", type=whole(2, 1000), default=16, metavar="N", help="histories of 2,000 failures (default 16)")
    drawn("--seed", type=SEED, default=0, metavar="N", help="seed of text, stragglers and failures (default 0)")
    how = parser.add_argument_group("how it is done and told").add_argument
    how(
        "--workers",
        type=whole(1, 256),
        metavar="N",
        help="processes, each with a rank's open streams in memory (default: the cores of this machine, at most 8)",
    )
    how("--json", action="store_true", help="print JSON")
    return parser


def _add_assumptions(parser: Parser) -> None:
    group = parser.add_argument_group("what is assumed")
    group.add_argument(
        "--step-seconds",
        type=number(0, 1e6, above_least=True),
        metavar="SECONDS",
        help="time of a step, as a plan or a run says it (default: what computing takes on the card)",
    )
    add_gpu(group)
    add_mfu(group)
    add_storage_and_failures(group)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `overrides` holds the settings that it changes."""
    return parse_with_overrides(make_parser(), arguments)


@command(NAME, RunConfigError, DataError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0 all rows came once, 1 they did not, 2 asked wrongly."""
    args = parse_args(arguments)
    config = load_run_config(run_arguments(args.config, args.overrides))
    ask = Ask(
        world_size=args.world_size,
        steps=args.steps,
        resume_on=args.resume_on,
        resume_at=args.resume_at,
        text_bytes=args.text,
        record_batch_bytes=args.record_batch_bytes,
        step_s=args.step_seconds,
        straggle=args.straggle,
        intervals=tuple(args.intervals or ()),
        histories=args.histories,
        seed=args.seed,
        workers=args.workers or default_workers(),
    )
    assumptions = Assumptions(
        gpu=args.gpu,
        network=NETWORKS["ib400"],
        mfu=args.mfu,
        **of_storage_and_failures(args),
    )
    found = simulate(config, ask, assumptions, name=" ".join([args.config.stem, *args.overrides]))
    print(json.dumps(found.to_json(), indent=2) if args.json else report(found))
    return 1 if found.conserved.faults else 0


if __name__ == "__main__":
    sys.exit(main())
