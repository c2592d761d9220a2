"""Run tasks of EleutherAI's evaluation harness on a trained BLT; needs the extra `harness` (lm-eval).

    blt-titan harness --model blt-1b --tasks arc_easy hellaswag
    blt-titan harness --model outputs/demo --entropy-checkpoint outputs/demo/entropy \
        --tasks my_task --include-path my_tasks/

`--tasks paper` names the tasks of the paper's tables; most tasks download their data. Tasks that run what the model
wrote (mbpp and humaneval, `paper` with them) ask for --confirm-run-unsafe-code.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from blt_titan.commands.arguments import (
    BATCH,
    COUNT,
    MODEL_CONTEXT,
    SEED,
    Parser,
    existing_directory,
    filled,
    whole,
    write_output,
)
from blt_titan.commands.ending import command
from blt_titan.commands.model_options import add_model_options, add_noise_option, add_result_options, prepare_models
from blt_titan.evaluation.noise import NOISE_ON
from blt_titan.inference.likelihood import CONTEXT_BYTES

PAPER_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "mmlu", "mbpp", "humaneval")
CODE_TASKS = ("mbpp", "humaneval")
"""Beginnings of names of tasks that run what the model wrote."""

NAME = "blt-titan harness"


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__, usage=f"{NAME} --model DIR|CKPT --tasks TASK [TASK ...] [options]")
    add_model_options(parser)
    _add_tasks(parser.add_argument_group("tasks"))
    _add_running(parser.add_argument_group("how they are run"))
    add_result_options(parser.add_argument_group("results"))
    return parser


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tasks", type=filled, required=True, nargs="+", metavar="TASK", help="names of the harness, or `paper`"
    )
    group.add_argument(
        "--include-path",
        type=existing_directory,
        metavar="DIR",
        help="folder with tasks of your own, as YAML (default: none)",
    )
    group.add_argument(
        "--num-fewshot", type=whole(0, 1000), metavar="N", help="examples in the context (default: the task's)"
    )
    group.add_argument("--limit", type=COUNT, metavar="N", help="the first N examples of each task (default: all)")
    group.add_argument("--confirm-run-unsafe-code", action="store_true", help="let tasks run code that the model wrote")


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-length",
        type=MODEL_CONTEXT,
        metavar="N",
        help=f"bytes that the model reads at most (default {CONTEXT_BYTES})",
    )
    group.add_argument(
        "--batch-size", type=BATCH, default=8, metavar="N", help="prompts continued at once (default %(default)s)"
    )
    add_noise_option(group)
    group.add_argument(
        "--noise-on",
        choices=NOISE_ON,
        default="prompt",
        help="which texts --noise changes; the paper averages over all three (default %(default)s)",
    )
    group.add_argument(
        "--seed", type=SEED, default=0, help="what noise and samples are drawn from (default %(default)s)"
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME, ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 2 after an error."""
    args = parse_args(arguments)
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from blt_titan.evaluation.harness import BLTHarness
    except ImportError as error:
        print(f"blt-titan harness: error: {error}; pip install 'blt_titan[harness]'", file=sys.stderr)
        return 2
    names = [name for task in args.tasks for name in (PAPER_TASKS if task == "paper" else (task,))]
    tasks = TaskManager(include_path=args.include_path)
    if unknown := [name for name in names if name not in tasks.all_tasks]:
        raise ValueError(f"the harness has no task {', '.join(unknown)}; --include-path adds tasks of your own")
    running = [name for name in names if name.startswith(CODE_TASKS)]
    if running and not args.confirm_run_unsafe_code:
        raise ValueError(
            f"{', '.join(running)}: runs code that the model wrote, on this machine; in a place where it can do no "
            "harm, say --confirm-run-unsafe-code"
        )
    if args.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # its metric asks by itself, too
    prepare_models(args)
    options = {} if args.max_length is None else {"max_length": args.max_length}
    kind: Any = BLTHarness
    model = kind(
        args.model,
        entropy=args.entropy_checkpoint,
        threshold=args.threshold,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        noise=args.noise,
        noise_on=args.noise_on,
        seed=args.seed,
        **options,
    )
    results: Any = simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
    )
    assert results is not None
    as_json = json.dumps(results["results"], indent=2, default=str)
    print(as_json if args.json else make_table(results))
    if args.out is not None:
        write_output(args.out, as_json + "\n")
    return 0
