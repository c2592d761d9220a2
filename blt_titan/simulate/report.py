"""A simulation as lines to read."""

import math
from collections.abc import Iterator

from blt_titan.simulate.simulate import Simulation

_MB, _GB = 1e6, 1e9


def report(found: Simulation) -> str:
    """Return what `blt-titan simulate` prints."""
    return "\n".join(
        [*_head(found), "", *_rows(found), "", *_state(found), "", *_conserved(found), "", *_failures(found)]
    )


def _head(found: Simulation) -> Iterator[str]:
    opened = found.opened
    yield (
        f"{found.name} on {found.before.world_size:,} GPUs: {found.before.dp_size:,} data-parallel ranks, "
        f"{found.before.global_batch:,} rows a step, {found.streams:,} streams"
    )
    yield (
        f"{opened.text_bytes / 1e12:.3g} TB of text in {opened.shards:,} shards, {opened.record_batches:,} record "
        "batches; none of its files is there"
    )
    yield (
        f"  a rank parses {opened.manifest_bytes / _MB:.2g} MB of manifest in {_s(opened.parse_s)}; its "
        f"fingerprint takes {_s(opened.fingerprint_s)}, each next record batch {_s(opened.order_s)}"
    )


def _rows(found: Simulation) -> Iterator[str]:
    source = "predicted: computing alone, nothing waited for" if found.predicted else "given"
    needed, rates, dp = found.needed_rows_per_s, found.rates, found.before.dp_size
    yield (
        f"rows: a step in {_s(found.step_s)} ({source}) needs {needed * dp:,.4g} rows/s, {needed:.3g} of each of "
        f"{dp:,} ranks"
    )
    yield (
        f"  a loader worker of this machine makes {rates.steady:,.0f} rows/s, {rates.after_start:,.0f} while streams "
        f"are met for the first time since a start; a trainer lays out {rates.laid_out:,.0f} rows/s"
    )
    if found.online:
        yield "  rows wait for the entropy model, which is not measured here"
    else:
        yield (
            f"  with {found.loader_workers} workers on cores like these a rank has {found.had_rows_per_s:,.0f} rows/s: "
            f"{found.had_rows_per_s / needed:,.3g} times what it needs (no disk is read here)"
        )


def _state(found: Simulation) -> Iterator[str]:
    state, after = found.state, found.after
    yield (
        f"loader's state: {state.file_bytes / _MB:.2f} MB in a checkpoint; a rank says its own in {_s(state.state_s)}, "
        f"the save of the whole takes {_s(state.save_s)}"
    )
    yield (
        f"  on {after.world_size:,} GPUs each rank reads it back in {_s(state.load_s)}, "
        f"{state.file_bytes * after.world_size / _GB:.2g} GB for all; the first batch comes "
        f"{_s(state.first_batch_s)} later"
    )
    streams = found.streams // found.before.dp_size
    yield (
        f"  a stream amid its text holds {state.stream_bytes / _MB:.2g} MB of ids and patches, the "
        f"{streams:,} streams of a rank {state.stream_bytes * streams / _GB:.2g} GB"
    )


def _conserved(found: Simulation) -> Iterator[str]:
    run, before, after = found.conserved, found.before, found.after
    yield (
        f"rows through a resume: steps 1 to {run.resume_at:,} on {before.world_size:,} GPUs ({before.dp_size:,} "
        f"ranks), to {run.steps:,} on {after.world_size:,} ({after.dp_size:,} ranks): {run.rows:,} rows, "
        f"{run.text_bytes / _GB:.3g} GB, in {_s(run.seconds)} on {found.processes} processes"
    )
    yield f"  {run.more_than_once:,} streams went on, {run.amid_record_batches:,} of them inside a record batch"
    if not run.amid_record_batches:
        rounds = -(-found.streams // before.global_batch)
        yield f"  NONE went on inside a record batch, so little was shown: {rounds:,} steps give each stream a row"
    if found.adapted:
        yield (
            f"  {after.world_size:,} GPUs do not fit the settings as they are; taken there, as the run must be told: "
            f"{', '.join(found.adapted)}"
        )
    served = run.resume_at * before.global_batch
    if rank := served % after.dp_size:
        yield (
            f"  {after.dp_size:,} ranks do not divide the {served:,} rows before the resume, and need not: "
            f"rank {rank} makes the next one"
        )
    if run.faults:
        yield from (f"  FAULT: {sentence}" for sentence in run.faults)
    else:
        yield "  each row of a run that never stops came once, in its order: none lost, none repeated"


def _failures(found: Simulation) -> Iterator[str]:
    operation, results = found.operation, found.outcome
    yield (
        f"steps: the slowest of {operation.gpus:,} GPUs takes {_s(operation.mean_step_s)} on average "
        f"(each is late by {operation.straggle:.2%} of a step on average, drawn exponentially)"
    )
    fails = "nothing fails"
    if not math.isinf(operation.between_failures_s):
        fails = f"a failure every {_s(operation.between_failures_s)}, then {_s(operation.restart_s)} to restart"
    saves = f"a save holds training up for {_s(operation.blocked_s)} and is stored after {_s(operation.save_s)}"
    yield f"  {fails}; {saves}"
    yield "  save every      steps     kept           saving  restarting  done again  formula"
    for one in results.intervals:
        said = ["own"] if one.steps == found.own_interval else []
        said += ["Young-Daly"] if one.steps == results.young_daly_steps and results.of(one.steps).lost else []
        said += ["best"] if one.steps == results.best_steps else []
        yield (
            f"  {_s(one.seconds):>10} {one.steps:10,} {one.goodput:8.3%} +-{one.spread:7.3%} {one.saving:8.3%} "
            f"{one.restarting:10.3%} {one.lost:11.3%} {one.formula:8.3%}  {', '.join(said)}".rstrip()
        )
    if not math.isinf(operation.between_failures_s):
        yield (
            f"  Young's and Daly's interval keeps {results.behind_best:.3%} (+-{results.behind_best_error:.3%}) less "
            f"of the time than the best that was tried, {results.best_steps:,} steps"
        )


def _s(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
