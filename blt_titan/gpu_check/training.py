"""Stages of training: the 1B and a slice of the 8B with small hash tables, and memory against what was predicted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from blt_titan.bench.rows import SLOTS_OVER_PATCHES, Work
from blt_titan.bench.shapes import TINY
from blt_titan.gpu_check.stage import Place, Stage, StageError, attempt, ok
from blt_titan.gpu_check.step import StepPlan, build_step, measure_step, plan_config, rank_alone
from blt_titan.model.args import BLTArgs
from blt_titan.model.flavors import BLT_FLAVORS

HASH_ROWS = 20_011
"""Small tables: they are only looked up, and the whole ones do not fit one GPU with their optimizer state."""
SLICES = (2, 6)
"""Global layers of the slices of the 8B; the difference gives what a layer costs."""
EAGER, COMPILED = "--compile.no-enable", "--compile.enable"
FLOAT8 = "--model.converters=quantize.linear.float8"
TARGET_1B = {"mfu": 0.5, "bytes_per_s": 164_000.0, "patch_8_over_4.5": 1.55}
TARGET_8B_FLOAT8 = {"bytes_per_s": 64_000.0}
MEMORY_CASES = {
    "400m_compiled": ("--model.flavor=400M", "--activation_checkpoint.mode=none", COMPILED),
    "400m_eager": ("--model.flavor=400M", "--activation_checkpoint.mode=none", EAGER),
    "100m_full": ("--model.flavor=100M", "--activation_checkpoint.mode=full", COMPILED),
}
"""Overrides of blt_1b.toml of which one GPU holds the whole step, optimizer state included. A prediction is made by
`blt-titan check-cuda --config blt_1b --world-size 1 --memory-only --json OVERRIDES > FOLDER/NAME.json`."""
MEMORY_RTOL = 0.05
"""How far the measured peak of tensors may be from the predicted one: library workspaces are in the first alone."""


def _checkpointing(mode: str) -> tuple[str, ...]:
    return (
        f"--activation_checkpoint.mode={mode}",
        *(["--activation_checkpoint.selective_ac_option=op"] * (mode == "selective")),
    )


def _plan(args: BLTArgs, place: Place, *overrides: str, patch_bytes: float = 4.5, config: str = "blt_1b") -> StepPlan:
    if place.tiny:
        n_layers = min(args.global_layers, 2)
        heads = 1 if args.global_head_dim == 128 else 2
        args, work = replace(TINY, global_layers=n_layers, global_heads=heads), Work(1, 256, patch_bytes)
    else:
        args = replace(args, hash_rows=HASH_ROWS)
        work = Work(1, 24_576 if config == "blt_1b" else 16_384, patch_bytes)
    return StepPlan(args, work, config, _on(place, overrides))


def _on(place: Place, overrides: tuple[str, ...]) -> tuple[str, ...]:
    if place.is_cuda:
        return overrides
    # Float8 is emulated on a CPU, for eager runs.
    emulated = ("--quantize.linear.float8.emulate", EAGER) if FLOAT8 in overrides else ()
    return tuple(o for o in overrides if not (emulated and o == COMPILED)) + emulated


def plans_1b(place: Place) -> dict[str, StepPlan]:
    """Return the variants of the 1B, the most telling first."""
    args, none = BLT_FLAVORS["1B"], _checkpointing("none")
    other_heads = replace(args, global_heads=2 * args.global_heads)
    return {
        "compiled": _plan(args, place, *none, COMPILED),
        "compiled_float8": _plan(args, place, *none, COMPILED, FLOAT8),
        "compiled_patch_8": _plan(args, place, *none, COMPILED, patch_bytes=8.0),
        "eager": _plan(args, place, *none, EAGER),
        "compiled_selective": _plan(args, place, *_checkpointing("selective"), COMPILED),
        "compiled_full": _plan(args, place, *_checkpointing("full"), COMPILED),
        "compiled_heads_64": _plan(other_heads, place, *none, COMPILED),
        "eager_full": _plan(args, place, *_checkpointing("full"), EAGER),
        "eager_heads_64": _plan(other_heads, place, *none, EAGER),
        "eager_float8": _plan(args, place, *none, EAGER, FLOAT8),
        "compiled_no_mesh": replace(_plan(args, place, *none, COMPILED), mesh_of_one=False),
    }


def train_1b(place: Place) -> Iterator[dict[str, Any]]:
    """Measure steps of the 1B's shape."""
    parts: dict[str, dict[str, Any]] = {}
    with rank_alone(place):
        for name, plan in plans_1b(place).items():
            parts[name] = attempt(lambda plan=plan: measure_step(plan, place), place) | {"overrides": plan.overrides}
            found: dict[str, Any] = {"ok": ok(parts), "steps": parts, "targets": TARGET_1B}
            short, long = (parts.get(n, {}).get("bytes_per_s") for n in ("compiled", "compiled_patch_8"))
            if short and long:
                found["patch_8_over_4.5"] = long / short
            yield found


def train_8b(place: Place) -> Iterator[dict[str, Any]]:
    """Measure slices of the 8B, and extend them to all of its layers."""
    parts: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    args = BLT_FLAVORS["8B"]
    few, more = SLICES
    with rank_alone(place):
        for precision, converters in (("bf16", ()), ("float8", (FLOAT8,))):
            for layers in SLICES:
                overrides = (*_checkpointing("none"), COMPILED, *converters)
                plan = _plan(replace(args, global_layers=layers), place, *overrides, config="blt_8b")
                parts[f"{precision}_{layers}"] = attempt(lambda plan=plan: measure_step(plan, place), place)
                yield {"ok": ok(parts), "steps": parts, "whole": whole, "target_float8": TARGET_8B_FLOAT8}
            few_s, more_s = (parts[f"{precision}_{layers}"].get("median_s") for layers in SLICES)
            if few_s and more_s:
                layer_s = (more_s - few_s) / (more - few)
                seconds = few_s + (args.global_layers - few) * layer_s
                n_bytes = parts[f"{precision}_{few}"]["row_bytes"]
                whole[precision] = {"layer_s": layer_s, "step_s": seconds, "bytes_per_s": n_bytes / seconds}
                yield {"ok": ok(parts), "steps": parts, "whole": whole, "target_float8": TARGET_8B_FLOAT8}


def memory(place: Place) -> Iterator[dict[str, Any]]:
    """Measure the peak of steps that a dry run predicts.

    Raises:
        StageError: the predictions are not what `blt-titan check-cuda --json` prints.
    """
    parts: dict[str, dict[str, Any]] = {}
    with rank_alone(place):
        for name, overrides in MEMORY_CASES.items():
            predicted = _predicted(name, place)
            part = attempt(lambda overrides=overrides: _measure_peak(overrides, place), place)
            part |= {"overrides": overrides, "predicted_bytes": predicted}
            if predicted is None:
                part["skipped"] = "there is no prediction: give --predictions a folder of check-cuda --json's files"
            elif "peak_bytes" in part:
                part["measured_over_predicted"] = part["peak_bytes"] / predicted
                part["within"] = abs(part["measured_over_predicted"] - 1) <= MEMORY_RTOL
            parts[name] = part
            yield {
                "ok": ok(parts) and all(part.get("within", True) for part in parts.values()),
                "cases": parts,
                "tolerance": MEMORY_RTOL,
            }


def _predicted(name: str, place: Place) -> int | None:
    path = None if place.predictions is None else place.predictions / f"{name}.json"
    if path is None or not path.exists():
        return None
    try:
        return int(json.loads(path.read_text())["memory"]["peak_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: is not what `blt-titan check-cuda --json` prints ({error!r})") from error


def _measure_peak(overrides: tuple[str, ...], place: Place) -> dict[str, Any]:
    plan = StepPlan(TINY, Work(1, 256), "blt_1b", overrides, mesh_of_one=False, micro_batches=2)
    config = plan_config(plan, place)
    if not place.tiny:
        seq_len, data = config.training.seq_len, config.data
        slots = seq_len // data.segment_bytes * data.segment_patches
        work = Work(config.training.local_batch_size, seq_len, seq_len / slots * SLOTS_OVER_PATCHES)
        assert work.patch_slots == slots, (work.patch_slots, slots)
        plan = replace(plan, args=BLT_FLAVORS[config.model.flavor], work=work)
    step = build_step(plan, place)
    for _ in range(2):
        step.run()
    if not place.is_cuda:
        return {"skipped": "the peak is measured on CUDA"}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


STAGES = {
    "train-1b": Stage(
        "steps of the 1B's shape: checkpointing, compile, float8, sizes of heads, patches of 8", train_1b
    ),
    "train-8b": Stage("steps of slices of the 8B, bf16 and float8, extended to all layers", train_8b),
    "memory": Stage("peak memory of steps against the dry run's prediction", memory),
}
