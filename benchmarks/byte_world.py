"""Compare two ways to run the local models where the global transformer is tensor-parallel.

    python -m benchmarks.byte_world --out benchmarks/results/byte_world.json

"context": ours; the cp and tp ranks together are context ranks, each runs encoder and decoder on its own slice of the
row. "repeated": the plain way; slices over cp alone, and the tp ranks of a slice repeat encoder and decoder. Its
patches are cut for sequence parallelism after the encoder and gathered before the decoder.

Both train the same rows to the same gradient norm (checked). Ranks are gloo processes on this machine, so times compare
work, not a network; bytes are counted from the collectives themselves. Steps alternate, figures are medians.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.result_file import write_result
from blt_titan.batch import IGNORE_LABEL, ContextSlice
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import RowShape
from blt_titan.loss import ByteCrossEntropy
from blt_titan.model.blt import BLT
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.model.placement import Placement
from blt_titan.titan import ParallelDims
from parallelisms.clipping import clip_grad_norm
from parallelisms.collectives import gather_along_dim_1
from parallelisms.context import with_context_parallel
from parallelisms.fsdp import apply_fsdp
from parallelisms.hash_tables import local_columns, shard_columns
from parallelisms.meshes import Meshes, build_meshes
from parallelisms.tensor import apply_tensor_parallel
from parallelisms.weights import write_shard
from tests.helpers.distributed import run_distributed
from tests.helpers.sent_bytes import SentBytes
from tests.helpers.word_rows import word_rows

SHAPE = RowShape(segments=8, segment_bytes=1024, segment_patches=320)
WINDOW_REACH = 1  # slices hold more bytes than the window


def build(plan: str, meshes: Meshes, flavor: str) -> tuple[Any, ContextSlice]:
    """Return a model split one way or the other, and the slice of each row that this rank takes."""
    args = dataclasses.replace(BLT_FLAVORS[flavor])
    with torch.device("meta"):
        model: Any = BLT(args)
    if plan == "repeated":
        meshes = dataclasses.replace(meshes, context=meshes.cp)
    placement = Placement(write_parameter=write_shard, local_columns=local_columns)
    placement = with_context_parallel(placement, meshes, halo_slices=WINDOW_REACH)
    if plan == "repeated":
        placement = repeat_local_models(model, placement, meshes)
    apply_tensor_parallel(model, meshes.tp, float8_all_gather=False)
    look_up = shard_columns(model.hash_embedding, meshes.bytes, compute_dtype=torch.float32)
    model.placement = dataclasses.replace(placement, look_up=look_up)
    apply_fsdp(
        model,
        patch_mesh=meshes.patches,
        byte_mesh=meshes.bytes,
        ignored=[model.hash_embedding.weight],
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        reshard_after_forward=True,
        cpu_offload=False,
    )
    model.to_empty(device="cpu")
    model.init_weights()
    part = ContextSlice(
        meshes.context.get_local_rank(), meshes.context.size(), args.local_window, args.local_window, WINDOW_REACH
    )
    return model, part


def repeat_local_models(model: Any, placement: Placement, meshes: Meshes) -> Placement:
    """Cut the encoder's patches over tp, and gather them for the decoder; return the placement for that."""
    encode, decode, tp = model.encoder.forward, model.decoder.forward, meshes.tp

    def encoder_forward(*inputs):
        states = encode(*inputs)
        return states._replace(p_BPG=states.p_BPG.chunk(tp.size(), dim=1)[tp.get_local_rank()])

    before = placement.last_patch_before
    assert before is not None
    whole: dict[str, torch.Tensor] = {}

    def last_patch_before(p_BPG, last_patch_B1):
        whole["p"] = gather_along_dim_1(p_BPG, tp)
        return before(whole["p"], last_patch_B1)

    def decoder_forward(h_BSd, p_BPG, *rest):
        return decode(h_BSd, whole.pop("p"), *rest)

    model.encoder.forward, model.decoder.forward = encoder_forward, decoder_forward
    return dataclasses.replace(placement, last_patch_before=last_patch_before)


def run(cp: int, tp: int, flavor: str, repetitions: int) -> dict[str, dict[str, Any]]:
    """Measure both plans on this rank."""
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=cp, tp=tp, pp=1, ep=1, etp=1, world_size=cp * tp)
    meshes = build_meshes(dims)
    rows = word_rows(1, SHAPE)
    plans = {plan: build(plan, meshes, flavor) for plan in ("context", "repeated")}
    seconds: dict[str, list[float]] = {plan: [] for plan in plans}
    sent: dict[str, int] = {}
    norms: dict[str, float] = {}
    for repetition in range(repetitions + 1):
        for plan, (model, part) in plans.items():
            model.zero_grad()
            ids_BS, layout, labels_BS = collate_rows(rows, SHAPE, part)
            # Targets as the ranks count them: `repeated` counts each tp times, which undoes its repeated gradients.
            targets = (labels_BS != IGNORE_LABEL).sum()
            dist.all_reduce(targets)
            loss_fn = ByteCrossEntropy()
            dist.barrier()
            began, counter = time.perf_counter(), SentBytes()
            if repetition == 0:
                with counter, loss_fn.step(targets):
                    loss_fn(model(ids_BS, layout), labels_BS).backward()
                sent[plan] = counter.total
                norms[plan] = clip_grad_norm(model.parameters(), 1e9, pp_mesh=None).item()
                continue
            with loss_fn.step(targets):
                loss_fn(model(ids_BS, layout), labels_BS).backward()
            dist.barrier()
            seconds[plan].append(time.perf_counter() - began)
    assert abs(norms["context"] - norms["repeated"]) <= 1e-4 * norms["context"], norms
    return {
        plan: {"seconds_per_step": seconds[plan], "bytes_sent": sent[plan], "grad_norm": norms[plan]} for plan in plans
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, default=2, help="context-parallel degree (default %(default)s)")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel degree (default %(default)s)")
    parser.add_argument("--flavor", default="20M", help="size of the model (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="measured steps of each plan (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(arguments)
    if "RANK" in os.environ:
        raise SystemExit("start it without torchrun: it starts its own ranks")
    by_rank = run_distributed(run, args.cp * args.tp, args.cp, args.tp, args.flavor, args.repetitions)
    plans = {}
    for plan in ("context", "repeated"):
        plans[plan] = {
            "median_seconds_per_step": statistics.median(by_rank[0][plan]["seconds_per_step"]),
            "bytes_sent_by_all_ranks": sum(rank[plan]["bytes_sent"] for rank in by_rank),
            "grad_norm": by_rank[0][plan]["grad_norm"],
        }
    ratio = {
        key: plans["context"][key] / plans["repeated"][key]
        for key in ("median_seconds_per_step", "bytes_sent_by_all_ranks")
    }
    figures = {
        "row": dataclasses.asdict(SHAPE),
        "cp": args.cp,
        "tp": args.tp,
        "flavor": args.flavor,
        "plans": plans,
        "context_over_repeated": ratio,
    }
    print(json.dumps(figures, indent=2))
    write_result(args.out, "byte_world", arguments, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
