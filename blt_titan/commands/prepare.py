r"""Turn text into byte shards for training and validation.

Copy and paste, for 4 MB of Python's own standard library in small record batches:

    blt-titan prepare --source python-stdlib --out data/stdlib --validation-fraction 0.05 \
        --seed 0 --max-bytes 4000000 --record-batch-bytes 16384

For a crawl of JSON lines, some Parquet and a tree of source code, on 16 cores, within 32 GiB of memory:

    blt-titan prepare --source 'crawl/*.jsonl.zst' web/ ~/code --workers 16 --memory 32GiB --out data/mixed

For a data set of the Hugging Face hub, streamed:

    blt-titan prepare --source fineweb_edu_10bt --workers 16 --out data/fineweb

Stopped at any moment, and started again with the same settings, it goes on where it was.
"""

import argparse
import logging
import os
from collections.abc import Sequence

from blt_titan.commands.arguments import (
    SEED,
    SIZES,
    Parser,
    filled,
    number,
    output_directory,
    output_directory_or_url,
    size_from,
    whole,
)
from blt_titan.commands.ending import command
from blt_titan.data.prepare.checks import MAX_SETTABLE_RECORD_BATCH_BYTES, least_memory_bytes
from blt_titan.data.prepare.job import MAX_RECORD_BYTES, MEMORY_BYTES, prepare
from blt_titan.data.prepare.sources import HUB_PRESETS
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import MAX_RECORD_BATCH_BYTES, RECORD_BATCH_BYTES, SHARD_BYTES


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(
        "blt-titan prepare",
        __doc__,
        usage="blt-titan prepare --source SOURCE [SOURCE ...] --out DIR [options]",
        epilog=SIZES,
    )
    _add_inputs(parser.add_argument_group("what to read, where to write"))
    _add_content(parser.add_argument_group("what comes out"))
    _add_records(parser.add_argument_group("records of the sources"))
    _add_work(parser.add_argument_group("how the work is done"))
    return parser


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--source",
        action="extend",
        nargs="+",
        type=filled,
        required=True,
        help="what to read, one or several. python-stdlib: the .py files of this Python. A directory: each text file "
        "in it is a document (.gz, .zst, .bz2, .xz: decompressed), and so is each record of its .jsonl (.gz, ...), "
        ".parquet and .arrow files and of folders that save_to_disk wrote. A file, or a "
        "pattern in quotation marks ('crawl/**/*.parquet'): the same. A URL (s3://, gs://, ...) of a file system "
        f"whose fsspec driver is installed. From the hub: {', '.join(HUB_PRESETS)}, or hf:NAME[:CONFIG][:SPLIT]",
    )
    add(
        "--out",
        type=output_directory_or_url,
        required=True,
        metavar="DIR",
        help="the directory or URL to write, made if missing",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace the data set in DIR, if it was made with other settings or is damaged; other files in DIR stay",
    )


def _add_content(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--validation-fraction",
        type=number(0, 1, below_most=True),
        default=0.01,
        metavar="F",
        help="the share of documents held out for validation, from 0 to below 1 (default %(default)s)",
    )
    add(
        "--seed",
        type=SEED,
        default=0,
        help="orders the documents and chooses those of validation (default %(default)s)",
    )
    add(
        "--max-bytes",
        type=size_from(1),
        metavar="SIZE",
        help="take whole documents up to this much text, in the seed's order; all is read even so (default: all)",
    )
    add(
        "--record-batch-bytes",
        type=size_from(1, MAX_SETTABLE_RECORD_BATCH_BYTES),
        default=RECORD_BATCH_BYTES,
        metavar="SIZE",
        help="text per record batch, the unit that is read and shuffled; training needs at least as many record "
        "batches as it has streams (default 256KiB; 16KiB suits a few megabytes)",
    )
    add(
        "--shard-bytes",
        type=size_from(1),
        default=SHARD_BYTES,
        metavar="SIZE",
        help="size of a shard file (default 1GiB)",
    )


def _add_records(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--text-column",
        type=filled,
        default="text",
        metavar="NAME",
        help="where records keep their text (default %(default)s)",
    )
    add(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="what a record does that cannot be used: end the work and be named, or be left out, named and counted in "
        "the manifest (default %(default)s)",
    )
    add(
        "--max-record-bytes",
        type=size_from(1, MAX_RECORD_BATCH_BYTES),
        default=MAX_RECORD_BYTES,
        metavar="SIZE",
        help="a longer file, line or text of a table cannot be used; see --on-error. A worker must have memory for ten "
        "times as much (default 64MiB)",
    )
    add(
        "--as-text",
        action="store_true",
        help="take files as texts even where they look like records: JSON lines that are not called .jsonl, JSON "
        "arrays of records, .csv; without it such a file cannot be used, see --on-error",
    )


def _add_work(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workers", type=whole(1, 1024), help="processes (default: as many as there are cores and memory for)")
    add(
        "--memory",
        type=size_from(1),
        metavar="SIZE",
        help="memory of all processes together (default: 1GiB for each worker, at most half of what the machine has)",
    )
    add(
        "--work",
        type=output_directory,
        metavar="DIR",
        help="where intermediate files go, up to twice as much as the text (default: .prepare in the --out directory)",
    )
    add("--no-progress", action="store_true", help="show no progress")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command("blt-titan prepare", DataError, stopped="stopped; the same command goes on from here")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    logging.basicConfig(format="blt-titan prepare: %(message)s")
    cores, half = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    least = least_memory_bytes(args.max_record_bytes)
    workers = max(1, min(cores, (args.memory or half) // least)) if args.workers is None else args.workers
    memory = max(least * workers, min(half, MEMORY_BYTES * workers)) if args.memory is None else args.memory
    summary = prepare(
        args.source,
        args.out,
        validation_fraction=args.validation_fraction,
        seed=args.seed,
        max_bytes=args.max_bytes,
        record_batch_bytes=args.record_batch_bytes,
        shard_bytes=args.shard_bytes,
        text_column=args.text_column,
        max_record_bytes=args.max_record_bytes,
        on_error=args.on_error,
        as_text=args.as_text,
        workers=workers,
        memory_bytes=memory,
        work=args.work,
        overwrite=args.overwrite,
        progress=not args.no_progress,
    )
    print(summary)
    return 0
