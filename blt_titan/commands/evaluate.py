"""Score texts with a trained BLT: bits per byte over whole documents with a sliding context, by source.

    blt-titan evaluate --model outputs/demo --entropy-checkpoint outputs/demo/entropy --data data/stdlib
    blt-titan evaluate --model blt-1b --data wiki.jsonl.zst 'books/*.txt' --noise random_case --out scores.json

Byte shards are read from their validation split; anything that `blt-titan prepare` reads can be named as well.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from blt_titan.commands.arguments import (
    COUNT,
    MODEL_CONTEXT,
    SEED,
    Parser,
    filled,
    whole,
    write_output,
)
from blt_titan.commands.ending import command
from blt_titan.commands.model_options import add_model_options, add_noise_option, add_result_options, load_models
from blt_titan.data.prepare.documents import SourcedDocument, read_documents
from blt_titan.data.prepare.sources import list_extents, resolve_sources
from blt_titan.data.store.manifest import MANIFEST_NAME
from blt_titan.evaluation.documents import DocumentScores, evaluate_documents
from blt_titan.inference.likelihood import CONTEXT_BYTES, LikelihoodScorer
from blt_titan.progress import ProgressBar

NAME = "blt-titan evaluate"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} --model DIR|CKPT --data DIR|FILE [DIR|FILE ...] [options]")
    add_model_options(parser)
    _add_texts(parser.add_argument_group("what is scored"))
    _add_scoring(parser.add_argument_group("how it is scored"))
    add_result_options(parser.add_argument_group("results"))
    return parser


def _add_texts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=filled,
        required=True,
        nargs="+",
        metavar="DIR|FILE",
        help="directories of byte shards, and files, patterns in quotation marks, or hf:NAME, as `blt-titan prepare` "
        "takes them",
    )
    group.add_argument(
        "--split",
        default="validation",
        choices=["train", "validation"],
        help="which split of byte shards (default %(default)s)",
    )
    group.add_argument(
        "--text-column",
        type=filled,
        default="text",
        help="where records keep their text (default %(default)s)",
    )
    group.add_argument("--as-text", action="store_true", help="take files as texts even where they look like records")
    group.add_argument(
        "--max-documents", type=COUNT, metavar="N", help="score the first N documents of each --data (default: all)"
    )


def _add_scoring(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--context-bytes",
        type=MODEL_CONTEXT,
        default=CONTEXT_BYTES,
        metavar="N",
        help="bytes that the model sees at once (default %(default)s)",
    )
    group.add_argument(
        "--stride-bytes",
        type=whole(1, 2**24),
        metavar="N",
        help="bytes by which the context moves on over a longer document, at most the context (default: half of it)",
    )
    add_noise_option(group)
    group.add_argument("--seed", type=SEED, default=0, help="what noise is drawn from (default %(default)s)")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    if args.stride_bytes is not None and args.stride_bytes > args.context_bytes:
        raise ValueError(
            f"--stride-bytes {args.stride_bytes}: must be 1 to --context-bytes {args.context_bytes}, so that windows "
            "leave nothing out"
        )
    for path in args.data:
        if args.out is not None and args.out.resolve() == Path(path).resolve():
            raise ValueError(f"--out {args.out}: is --data {path}, and would replace it; name another file")
        if not (Path(path) / MANIFEST_NAME).is_file():
            # Before the model: it may not be there, and a pattern may fit nothing.
            list_extents([source for source in resolve_sources([path]) if source.kind == "pattern"], {})
    loaded = load_models(args)
    scorer = LikelihoodScorer(
        loaded.model,
        loaded.rule,
        loaded.entropy_model,
        context_bytes=args.context_bytes,
        stride_bytes=args.stride_bytes,
    )
    scored = evaluate_documents(scorer, _documents(args), noise=args.noise, seed=args.seed)
    if not scored:
        raise ValueError(f"--data {', '.join(args.data)}: no documents")
    figures = {source: scores.summary() for source, scores in scored.items()}
    if len(scored) > 1:
        figures["all"] = _together(scored.values()).summary()
    result = {
        "model": loaded.origin,
        "patching": loaded.rule.as_dict(),
        "context_bytes": args.context_bytes,
        "stride_bytes": args.stride_bytes or args.context_bytes // 2,
        "noise": args.noise,
        "sources": figures,
    }
    as_json = json.dumps(result, indent=2, allow_nan=False)
    if args.json:
        print(as_json)
    else:
        _print_table(figures)
    if args.out is not None:
        write_output(args.out, as_json + "\n")
    return 0


def _print_table(figures: Mapping[str, dict[str, Any]]) -> None:
    print(f"{'bits/byte':>10}  {'95% interval':>16}{'patch':>7}{'documents':>11}{'bytes':>14}  source")
    for source, of_source in figures.items():
        interval = "-"
        if of_source["bits_per_byte_95"] is not None:
            interval = " - ".join(f"{bound:.4f}" for bound in of_source["bits_per_byte_95"])
        print(
            f"{of_source['bits_per_byte']:>10.4f}  {interval:>16}{of_source['mean_patch_bytes']:>7.2f}"
            f"{of_source['documents']:>11,}{of_source['bytes']:>14,}  {source}"
        )


def _documents(args: argparse.Namespace) -> Iterator[SourcedDocument]:
    with ProgressBar(unit="B", unit_scale=True, desc="reading") as bar:
        for path in args.data:
            for document in islice(
                read_documents(path, split=args.split, text_column=args.text_column, as_text=args.as_text),
                args.max_documents,
            ):
                bar.update(len(document.text))
                yield document


def _together(scored) -> DocumentScores:
    together = DocumentScores()
    for scores in scored:
        for name in ("byte_nats", "eos_nats", "n_bytes", "patches"):
            getattr(together, name).extend(getattr(scores, name))
    return together
