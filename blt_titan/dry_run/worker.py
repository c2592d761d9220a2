"""The process of a dry run: `python -m blt_titan.dry_run.worker REQUEST.json`, started by `run.dry_run`.

REQUEST.json says the TOML, the ranks, the card, and where the result is to be written; torch finds the stubs that
`stubs.stub_environment` preloaded. Progress goes to standard error.
"""

import json
import logging
import sys
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt_titan.dry_run.cards import CARDS, Card
from blt_titan.dry_run.errors import DryRunError

if TYPE_CHECKING:
    from blt_titan.dry_run.compiler import Graph
    from blt_titan.dry_run.result import DryRun
    from blt_titan.dry_run.roofline import Roofline
    from blt_titan.dry_run.traffic import Attention, Traffic

STEPS = 2


def main() -> None:
    """Make the dry run that a file asks for, and write what came of it."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        answer = {"result": _measure(request).to_json()}
    except DryRunError as error:
        answer = {"error": str(error)}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _measure(request: dict[str, Any]) -> "DryRun":
    # In this order: torchtitan asks for the device when it is imported, and the stand-in must be there.
    from blt_titan.dry_run import fake_cuda

    card, device = CARDS[request["gpu"]], request["device"]
    if device == "cuda":
        fake_cuda.install(card, stub=request["stub"])
    else:
        fake_cuda.let_meshes_be_real()
    from blt_titan.config.read import load_run_config
    from blt_titan.custom_import import import_custom
    from blt_titan.dry_run.bounds import allowed_spills
    from blt_titan.dry_run.result import DryRun

    began = time.perf_counter()
    config = load_run_config([f"--job.config_file={request['config']}"])
    if config.experimental.custom_import:
        import_custom(config.experimental.custom_import)
    found = _run(config, request, card)
    degrees = ("pipeline_parallel", "data_parallel_replicate", "context_parallel", "tensor_parallel")
    layout = {name: getattr(config.parallelism, f"{name}_degree") for name in degrees}
    import torch

    return DryRun(
        config=request["name"],
        world_size=request["world_size"],
        rank=request["rank"],
        gpu=card.name,
        device=device,
        torch=str(torch.__version__),
        layout={name: degree for name, degree in layout.items() if degree > 1},
        kernels_made=request["kernels"],
        seconds=round(time.perf_counter() - began, 1),
        allowed_spills=allowed_spills(),
        **found,
    )


def _run(config: Any, request: dict[str, Any], card: Card) -> dict[str, Any]:
    from blt_titan.byte_vocab import VOCAB_SIZE
    from blt_titan.dry_run import step as steps
    from blt_titan.dry_run.compiler import Compiler
    from blt_titan.dry_run.host_reads import HostReads
    from blt_titan.dry_run.memory import LiveBytes
    from blt_titan.dry_run.result import GraphResult
    from blt_titan.dry_run.sent import Sent
    from blt_titan.dry_run.traffic import Traffic
    from blt_titan.titan import logger
    from blt_titan.training.spec import TRAIN_SPECS

    logger.setLevel(logging.ERROR)
    args = TRAIN_SPECS[config.model.name].model_args[config.model.flavor]
    device = request["device"]
    reads, memory, traffic = HostReads(), LiveBytes(VOCAB_SIZE, device), Traffic(card, _attention(args))
    sent = Sent()
    # A CPU's kernels are not known.
    watch = steps.Watch([reads, *([traffic] if device == "cuda" else []), memory, sent])
    for observer in (reads, memory, traffic, sent):
        observer.watch = watch

    def around(graph: "Graph") -> AbstractContextManager[None]:
        traffic.ran(graph)
        return watch.at(in_graph=True)

    compiler = Compiler(card, kernels=request["kernels"], around=around, part=lambda: watch.part, progress=_say)
    compiler.install(device)
    world_size = request["world_size"]
    place = steps.take_place(config, world_size, request["rank"])
    sent.world_axes = place.axes
    _say(f"{request['name']} on {world_size} ranks: building the model")
    with steps.fake_mode():
        step = steps.make_step(config, place, watch, memory, device)
        parameters = sum(parameter.numel() for parameter in step.parameters())
        for number in range(1, STEPS + 1):
            _say(f"step {number} of {STEPS}")
            reads.forget()
            memory.forget_peaks()
            traffic.forget()
            sent.forget()
            step.run()
            compiler.first_is_over = True
            between = memory.now()
    return {
        "parameters": parameters,
        "memory": memory.result(between),
        "sent": sent.result(step.micro_batches),
        "host_reads": reads.found(),
        "graph_breaks": compiler.graph_breaks(),
        "graphs": [
            GraphResult(
                part=graph.part,
                backward=graph.backward,
                inputs=len(graph.inputs),
                symbolic=graph.symbolic,
                recompiled=graph.after_first,
                kernels=graph.kernels,
            )
            for graph in compiler.graphs
        ],
        "roofline": _roofline(traffic, config, args, step.micro_batches) if request["kernels"] else None,
    }


def _attention(args: Any) -> dict[str, "Attention"]:
    """Return how much of the scores each part of a model computes."""
    from blt_titan.dry_run.traffic import Attention
    from blt_titan.dry_run.watch import GLOBAL_PART, LOCAL_PARTS

    if not hasattr(args, "local_window"):
        return {GLOBAL_PART: Attention(args.window)}
    return {GLOBAL_PART: Attention(None)} | dict.fromkeys(LOCAL_PARTS, Attention(args.local_window))


def _roofline(traffic: "Traffic", config: Any, args: Any, micro_batches: int) -> "Roofline":
    parallelism, training, data = config.parallelism, config.training, config.data
    row_ranks = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    n_bytes = training.local_batch_size * training.seq_len // row_ranks
    flops = 3 * args.forward_flops_per_byte(training.seq_len, data.segment_bytes / data.segment_patches)
    return traffic.result(micro_batches=micro_batches, model_flops=flops * n_bytes, micro_batch_bytes=n_bytes)


def _say(line: str) -> None:
    print(f"check-cuda: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
