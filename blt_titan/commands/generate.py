"""Continue a prompt with a trained BLT, byte by byte, with caches at all three levels.

    blt-titan generate --model blt-1b --prompt "The quick brown"
    blt-titan generate --model outputs/demo --entropy-checkpoint outputs/demo/entropy --prompt - < file.py

Another --threshold makes other patches: a higher one longer patches, less compute for a byte, and a worse text.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.commands.arguments import BATCH, SEED, Parser, existing_file, number, whole
from blt_titan.commands.ending import command
from blt_titan.commands.model_options import add_model_options, load_models
from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.generate import BATCH_SIZE, MAX_BYTES, TEMPERATURE
from blt_titan.inference.likelihood import CONTEXT_BYTES
from blt_titan.inference.sample import LEAST_TEMPERATURE, Sampling, TextStream, sample_steps

NAME = "blt-titan generate"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} --model DIR|CKPT (--prompt PROMPT | --batch FILE) [options]")
    add_model_options(parser)
    _add_prompts(parser.add_argument_group("what is continued"))
    _add_sampling(parser.add_argument_group("what is sampled"))
    return parser


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--prompt", help="the text to continue; - reads standard input, to its end")
    one.add_argument(
        "--batch", type=existing_file, metavar="FILE", help="one prompt on each line; JSON lines are printed"
    )
    group.add_argument(
        "--batch-size",
        type=BATCH,
        default=BATCH_SIZE,
        metavar="N",
        help="prompts of --batch continued at once (default %(default)s)",
    )
    group.add_argument(
        "--context-bytes",
        type=whole(1, 2**24),
        default=CONTEXT_BYTES,
        metavar="N",
        help="read the last N bytes of a longer prompt (default %(default)s)",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-bytes",
        type=whole(1, 2**24),
        default=MAX_BYTES,
        metavar="N",
        help="bytes to sample at most (default %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=number(LEAST_TEMPERATURE, 1000, or_zero=True),
        default=TEMPERATURE,
        metavar="T",
        help="what logits are divided by; 0 takes the likeliest byte (default %(default)s)",
    )
    group.add_argument(
        "--top-k", type=whole(1, VOCAB_SIZE), metavar="N", help="choose among the N likeliest bytes (default: all)"
    )
    group.add_argument(
        "--top-p",
        type=number(0, 1, above_least=True),
        metavar="P",
        help="choose among the likeliest bytes that together have probability P (default: all)",
    )
    group.add_argument("--seed", type=SEED, default=0, help="what samples are drawn from (default %(default)s)")
    group.add_argument("--show-patches", action="store_true", help="print afterwards where patches begin")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    prompts = [_last(prompt, args.context_bytes) for prompt in _prompts(args)]
    loaded = load_models(args)
    _run(args, CachedBLT(loaded.model, loaded.rule, loaded.entropy_model), prompts, sampling)
    return 0


def _run(args: argparse.Namespace, generator: CachedBLT, prompts: list[bytes], sampling: Sampling) -> None:
    began, n_bytes = time.perf_counter(), 0
    for first in range(0, len(prompts), args.batch_size):
        batch = prompts[first : first + args.batch_size]
        made: list[list[int]] = [[] for _ in batch]
        stream = TextStream()
        seeds = [args.seed + first + row for row in range(len(batch))]
        for step in sample_steps(generator, batch, max_bytes=args.max_bytes, sampling=sampling, seeds=seeds):
            for of_row, byte in zip(made, step, strict=True):
                if byte is not None:
                    of_row.append(byte)
            if args.batch is None and step[0] is not None:
                _put(stream.feed(bytes([step[0]])))
        n_bytes += sum(map(len, made))
        if args.batch is None:
            _put(stream.end() + "\n")
        for row, (prompt, of_row) in enumerate(zip(batch, made, strict=True)):
            if args.batch is not None:
                said = {"prompt": _text(prompt), "text": _text(bytes(of_row))}
                _put(json.dumps(said, ensure_ascii=False) + "\n")
            if args.show_patches:
                print(_patches(prompt + bytes(of_row), generator.patch_lengths(row)), file=sys.stderr)
    seconds = time.perf_counter() - began
    print(f"{n_bytes} bytes in {seconds:.2f} s, {n_bytes / max(seconds, 1e-9):.1f} bytes/s", file=sys.stderr)


def _prompts(args: argparse.Namespace) -> list[bytes]:
    if args.batch is not None:
        prompts = args.batch.read_bytes().splitlines()
        if not prompts:
            raise ValueError(f"{args.batch}: holds no prompt")
        return prompts
    # What a shell passes need not be UTF-8.
    return [sys.stdin.buffer.read() if args.prompt == "-" else args.prompt.encode(errors="surrogateescape")]


def _last(prompt: bytes, context_bytes: int) -> bytes:
    if len(prompt) > context_bytes:
        print(
            f"blt-titan generate: a prompt of {len(prompt)} bytes: read are the last {context_bytes}", file=sys.stderr
        )
    return prompt[-context_bytes:]


def _patches(content: bytes, lengths: list[int]) -> str:
    """Write a text with `|` before each patch; the first is BOS alone, and the last may lack a byte."""
    parts, place = [], 0
    for length in lengths[1:]:
        parts.append(content[place : place + length])
        place += length
    return "patches: " + "|".join(_text(part).replace("\n", "\\n") for part in parts if part)


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _put(text: str) -> None:
    # UTF-8, whatever the terminal's locale says.
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
