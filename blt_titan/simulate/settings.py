"""What is simulated of a run: its text, its ranks before and after a resume, and the steps between them."""

import copy

from blt_titan.config.check import RunConfigError, check_run
from blt_titan.config.rules.ranks import data_parallel
from blt_titan.config.rules.target import CARD
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.packing import RowShape
from blt_titan.patching.rule import PatchRule
from blt_titan.plan.layout import layout_of, step_bytes
from blt_titan.simulate.data import Text
from blt_titan.simulate.ranks import World
from blt_titan.training.data import dataset_paths

_MOST_REPLICAS = 64
"""Copies of the weights that are tried."""


def text_of(config: RunConfig, text_bytes: int, record_batch_bytes: int, seed: int) -> Text:
    """Return text for a run of sound settings; a mixture's data sets get shares of it by their weights."""
    data, training = config.data, config.training
    weights = tuple(data.mixture.values())
    shares = [weight / sum(weights) for weight in weights] or [1.0]
    paths = dataset_paths(data, training)
    return Text(
        sets=tuple((path, max(1, int(text_bytes * share))) for path, share in zip(paths, shares, strict=True)),
        weights=weights,
        record_batch_bytes=record_batch_bytes,
        streams=data.streams,
        order_seed=data.seed,
        rule=PatchRule.of(config.patching),
        shape=RowShape(training.seq_len // data.segment_bytes, data.segment_bytes, data.segment_patches),
        seed=seed,
        custom_import=config.experimental.custom_import,
    )


def world_of(config: RunConfig, world_size: int) -> World:
    """Check the settings on so many GPUs and return the world.

    Raises:
        RunConfigError: they are not sound there.
    """
    check_run(config, world_size=world_size, verify_data=False, look_at_disk=False, target=CARD)
    layout = layout_of(config, world_size)
    rows = step_bytes(config, layout) // config.training.seq_len
    return World(world_size, layout.dp, config.training.local_batch_size, rows)


def resumed_world(config: RunConfig, world_size: int) -> tuple[World, list[str]]:
    """Return the world that a run goes on in, and the settings that it must be told there.

    What does not fit so many GPUs is changed in two places: more copies of the weights
    (`parallelism.data_parallel_replicate_degree`), and the global batch that is nearest.

    Raises:
        RunConfigError: it cannot be made to fit; with the sentences of the settings as they are.
    """
    asked = config.parallelism.data_parallel_replicate_degree
    first: RunConfigError | None = None
    least = max(1, asked)
    for replicas in (least, *range(least + 1, min(world_size, _MOST_REPLICAS) + 1)):
        changed = copy.deepcopy(config)
        changed.parallelism.data_parallel_replicate_degree = replicas
        dp = data_parallel(changed.parallelism, world_size)
        rows, together = changed.training.global_batch_size, changed.training.local_batch_size * (dp.ranks if dp else 1)
        if dp and rows > 0 and rows % together:
            changed.training.global_batch_size = together * max(1, round(rows / together))
        try:
            world = world_of(changed, world_size)
        except RunConfigError as error:
            first = first or error
            continue
        pairs = {
            "parallelism.data_parallel_replicate_degree": (asked, replicas),
            "training.global_batch_size": (rows, changed.training.global_batch_size),
        }
        return world, [f"{key}={new} (was {old})" for key, (old, new) in pairs.items() if old != new]
    assert first is not None
    raise RunConfigError(*(f"--resume-on {world_size}: {sentence}" for sentence in first.sentences)) from first


def choose_steps(
    streams: int, before: World, after: World, steps: int | None, resume_at: int | None
) -> tuple[int, int]:
    """Return the steps of the run, and the one that is saved.

    Args:
        streams: of the run.
        before: the world that begins.
        after: the world that goes on.
        steps: asked for; None for as many as give each stream a row before the save and one after it.
        resume_at: asked for; None for about the middle, and if possible where the ranks that go on do not divide the
            rows before.

    Raises:
        RunConfigError: there is no such step.
    """
    if resume_at is None:
        middle = -(-streams // before.global_batch) if steps is None else steps // 2
        last = middle + 1 if steps is None else min(middle + 1, steps - 1)
        uneven = (step for step in range(middle, last + 1) if step * before.global_batch % after.dp_size)
        resume_at = next(uneven, middle)
    if steps is None:
        steps = resume_at + -(-streams // after.global_batch)
    if steps <= resume_at:
        raise RunConfigError(f"--steps {steps}: must be more than the step that is saved, {resume_at}")
    return steps, resume_at
