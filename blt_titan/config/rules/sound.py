"""All rules on a run's settings, in the order in which their faults are shown.

In: the settings and the number of ranks. Out: a sentence for each fault.

The decision that is not obvious: a value out of its bounds is named once. A rule that would go on from it has nothing
to say, because whatever it said would be about a value that is no setting: `segment_bytes = 0` is no divisor of a row.
"""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, cast

from blt_titan.config.rules import effect, operation, parallel, ranks, rows
from blt_titan.config.rules.keys import refused_keys
from blt_titan.config.rules.target import Target, this_machine
from blt_titan.config.run_config import RunConfig


def sound(config: RunConfig, world_size: int, target: Target | None = None) -> list[str]:
    """Return a sentence for each fault of a run's settings, empty if there is none; looks at no file.

    Args:
        config: as `load_run_config` returns it.
        world_size: ranks of the whole job.
        target: what it shall run on; None for this machine.
    """
    refused = refused_keys(config)
    within_bounds = cast(RunConfig, _WithinBounds(config, refused, ""))
    found = list(refused.values())
    for rule in _rules(within_bounds, world_size, target or this_machine()):
        found += _sentences(rule)
    return found


def _rules(config: RunConfig, world_size: int, target: Target) -> tuple[Iterator[str], ...]:
    """Return the rules, none of which has begun."""
    model, training, validation, data = config.model, config.training, config.validation, config.data
    parallelism, checkpoint, patching = config.parallelism, config.checkpoint, config.patching
    float8 = config.quantize.linear.float8
    return (
        effect.of_loader(training.dataloader, data),
        effect.of_export_dtype(checkpoint),
        effect.of_initial_load(checkpoint),
        effect.of_checkpoints(checkpoint),
        effect.of_determinism(config.debug),
        effect.of_memory_budget(config.activation_checkpoint),
        effect.of_float8(model, float8),
        effect.of_entropy_model(model, config.entropy_model),
        effect.of_hash_tables(model, config.hash_embedding),
        effect.of_local_blocks(model, config.local_blocks),
        effect.of_failure(config.failure),
        parallel.flavor(model),
        ranks.seed_checkpoint(checkpoint, world_size),
        ranks.degrees(parallelism, world_size),
        ranks.batch(training, parallelism, world_size),
        ranks.streams(data, parallelism, world_size),
        rows.lengths(training, validation, data),
        rows.patches(patching, data),
        rows.patch_rule(patching),
        rows.entropies(patching),
        *parallel.rules(config, world_size, target),
        operation.schedule(config.lr_scheduler, training),
        operation.profiling_cycle(config.profiling),
        operation.on_a_cpu(checkpoint, config.profiling, training, target),
        operation.predicted_memory(config.monitor, target),
        operation.page_locked(training.dataloader, target),
        operation.packages(config.metrics),
        operation.exports(config.export, model, checkpoint),
        operation.skipping(config.failure, config.optimizer, target),
        operation.rollback(config.failure, checkpoint, float8),
        operation.waits(config.heartbeat, data, config.comm, world_size),
        rows.text(training, data),
    )


class _OutOfBoundsError(Exception):
    """A rule asked for a value that is refused already."""


class _WithinBounds:
    """The settings, or a section of them, that gives out no value which is refused already."""

    def __init__(self, section: Any, refused: dict[str, str], prefix: str):
        self._section, self._refused, self._prefix = section, refused, prefix

    def __getattr__(self, name: str) -> Any:
        key, value = f"{self._prefix}{name}", getattr(self._section, name)
        if key in self._refused:
            raise _OutOfBoundsError(key)
        return _WithinBounds(value, self._refused, f"{key}.") if is_dataclass(value) else value


def _sentences(rule: Iterator[str]) -> Iterator[str]:
    try:
        yield from rule
    except _OutOfBoundsError:
        return
