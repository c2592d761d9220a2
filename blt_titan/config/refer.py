"""What a run's settings refer to: the text and its entropies, the checkpoint it begins from, entropy models.

In: settings that are sound by themselves (`rules/sound.py`). Out: nothing, or an error that says all that is missing,
damaged or of another run. Asked once per node; ranks that start later find what was checked here.

The decision that is not obvious: no weights are read to learn what a model is. They are read where a digest decides,
which is when a run goes on from a checkpoint or exports with a patcher, and then once in a process (`online_model`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blt_titan.checkpoint.load import find_entropy_model
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.checkpoint.steps import step_folder
from blt_titan.config.read import RunConfigError
from blt_titan.config.resume import check_model, checkpoint_to_load, loads_weights_only, run_checkpoints, saved_position
from blt_titan.config.run_config import RunConfig
from blt_titan.data.rows.continuation import check_continues, data_identity
from blt_titan.data.rows.mixture import ShardSets
from blt_titan.data.rows.patcher import patch_decisions
from blt_titan.data.store.address import Address, is_remote
from blt_titan.data.store.disk_cache import DiskCache
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import read_manifest
from blt_titan.data.store.object_store import RemoteFolder
from blt_titan.data.store.shards import ShardSet
from blt_titan.hf.config import HFConfigError, hf_config, why_not_by_itself
from blt_titan.hf.export import check_entropy_model, stored_weights
from blt_titan.job_config import Data
from blt_titan.model.args import EntropyModelArgs
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.patching.rule import PatchRule
from blt_titan.training.data import (
    dataset_paths,
    entropies_fingerprint,
    fetching_of,
    open_shards,
    open_sidecars,
    stream_order,
)
from blt_titan.training.spec import TRAIN_SPECS


def refer(config: RunConfig, *, dp: int, verify_data: bool) -> None:
    """Check that everything which the settings refer to is there, whole, and of this run.

    Args:
        config: settings that are sound.
        dp: data-parallel ranks.
        verify_data: also read small data in full (`data.verify_bytes_at_start`).

    Raises:
        RunConfigError: naming the key, its value and what is allowed; a sentence for each fault, if there are several.
        DataError: naming the file.
        CheckpointError: likewise.
    """
    faults: list[Exception] = []
    checkpoint, weights_only, shards = None, False, None
    with _noted(faults):
        _check_seed_checkpoint(config)
    with _noted(faults):
        checkpoint = checkpoint_to_load(config)
        if checkpoint is not None:
            weights_only = loads_weights_only(config, checkpoint)
            check_model(checkpoint, config, TRAIN_SPECS[config.model.name], weights_only=weights_only)
    with _noted(faults):
        shards = _check_data(config, dp)
        if verify_data:
            for split in shards:
                _verify(split, config.data)
    # What both must be to each other is looked at when each is sound.
    if not faults and shards is not None:
        with _noted(faults):
            if (
                checkpoint is not None
                and not weights_only
                and "dataloader" not in config.checkpoint.exclude_from_loading
            ):
                _check_position(config, shards[0], checkpoint)
        with _noted(faults):
            if config.export.hf_every:
                _check_export(config, shards[0])
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise RunConfigError(*(sentence for fault in faults for sentence in getattr(fault, "sentences", (str(fault),))))


@contextmanager
def _noted(faults: list[Exception]) -> Iterator[None]:
    """Note what is wrong, so that what else is wrong is said as well."""
    try:
        yield
    except (RunConfigError, DataError, CheckpointError) as fault:
        faults.append(fault)


def _check_seed_checkpoint(config: RunConfig) -> None:
    path = step_folder(run_checkpoints(config), 0)
    if config.checkpoint.create_seed_checkpoint and path.exists():
        raise RunConfigError(
            f"checkpoint.create_seed_checkpoint = true: {path} is there already; remove it, or choose another "
            "job.dump_folder"
        )


def _check_data(config: RunConfig, dp: int) -> list[ShardSets]:
    """Open what the rows are made of; return the splits that the run reads, its training text first."""
    paths, streams = dataset_paths(config.data, config.training), config.data.streams
    fetching = fetching_of(config.data)
    for path in paths:
        key = f"data.mixture: {path!r}" if config.data.mixture else f"training.dataset_path = {path!r}"
        if is_remote(path):
            try:
                read_manifest(RemoteFolder(Address(path), fetching))
            except DataError as error:
                raise RunConfigError(f"{key}: {error}") from error
        elif not Path(path).is_dir():
            raise RunConfigError(f"{key}: no such directory; make it with `blt-titan prepare`")
    train = open_shards(paths, "train", fetching)
    shards = [train, open_shards(paths, "validation", fetching)] if config.validation.enable else [train]
    _check_cache(config.data, [s for split in shards for s in split.sets if s.is_remote])
    stream_order(config.data, train)
    if len(train) < streams:
        lower = f"set data.streams = {len(train) // dp * dp}, or " if len(train) >= dp else ""
        raise RunConfigError(
            f"data.streams = {streams}: {', '.join(paths)} has only {len(train)} record batches, and every stream "
            f"needs one; {lower}prepare the data with smaller --record-batch-bytes"
        )
    if PatchRule.of(config.patching).by_entropy and config.patching.source == "sidecar":
        for split in shards:
            open_sidecars(paths, config.patching.sidecar, split)
    elif config.patching.entropy_checkpoint is not None:
        _entropy_model("patching.entropy_checkpoint", config.patching.entropy_checkpoint)
    return shards


def _check_cache(data: Data, remote: list[ShardSet]) -> None:
    """Check that what comes from object stores can be kept."""
    if not remote:
        return
    fetching = fetching_of(data)
    DiskCache(fetching.cache_dir, fetching.cache_bytes).check()
    # Those of entropies are as large. Without them at hand, each read would fetch one first.
    if (needed := 4 * sum(shards.index_bytes for shards in remote)) > data.cache_bytes:
        raise RunConfigError(
            f"data.cache_bytes = {data.cache_bytes}: must be at least {needed}, twice the indexes of text and entropies"
        )


def _verify(shards: ShardSets, data: Data) -> None:
    for shard_set in shards.sets:
        small = shard_set.text_bytes <= data.verify_bytes_at_start
        if small and data.on_damage == "stop" and not shard_set.is_remote:
            shard_set.verify_checksums()
        else:
            shard_set.verify_structure()


def _check_position(config: RunConfig, shards: ShardSets, checkpoint: Path) -> None:
    """Check that the run's data can be read on from where a checkpoint is."""
    order = stream_order(config.data, shards)
    fingerprint = entropies_fingerprint(config.patching, dataset_paths(config.data, config.training), shards)
    patching = patch_decisions(PatchRule.of(config.patching), fingerprint)
    try:
        saved, _ = saved_position(checkpoint)
        own = data_identity(shards.fingerprint, order, patching)
        check_continues(saved, own, patching_may_change=config.patching.allow_change)
    except DataError as error:
        raise RunConfigError(f"{checkpoint}: {error}") from error


def _check_export(config: RunConfig, shards: ShardSets) -> None:
    """Check that the run's checkpoints can become directories that transformers loads."""
    export, rule = config.export, PatchRule.of(config.patching)
    section = "export" if export.entropy_checkpoint else "patching"
    path = export.entropy_checkpoint or config.patching.entropy_checkpoint
    checkpoint, entropy_args = _entropy_model(f"{section}.entropy_checkpoint", path) if path else (None, None)
    alone = why_not_by_itself(entropy_args, rule)
    if alone and not export.force:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every}, but transformers cannot cut texts for this model: {alone}. Set "
            "export.entropy_checkpoint if that is missing, or export.force = true to need explicit patch_lengths there"
        )
    if checkpoint is not None and not alone and not _scores_with(config, checkpoint):
        fingerprint = entropies_fingerprint(config.patching, dataset_paths(config.data, config.training), shards)
        assert fingerprint is not None  # else transformers could not cut texts for it
        try:
            check_entropy_model(fingerprint, stored_weights(checkpoint))
        except CheckpointError as error:
            raise RunConfigError(f"{section}.entropy_checkpoint = {path!r}: {error}") from error
    try:
        hf_config(BLT_FLAVORS[config.model.flavor], None if alone else entropy_args, rule)
    except HFConfigError as error:
        raise RunConfigError(
            f"export.hf_every = {export.hf_every}, which transformers cannot express: {error}"
        ) from error


def _scores_with(config: RunConfig, checkpoint: Path) -> bool:
    """Tell whether a checkpoint is the entropy model that the run itself scores its text with."""
    path = config.patching.entropy_checkpoint
    return path is not None and find_entropy_model(path)[0].resolve() == checkpoint.resolve()


def _entropy_model(key: str, path: str) -> tuple[Path, EntropyModelArgs]:
    try:
        return find_entropy_model(path)
    except CheckpointError as error:
        raise RunConfigError(f"{key} = {path!r}: {error}") from error
