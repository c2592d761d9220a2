"""Keys that have no effect because another key is as it is: refused, not ignored. Each rule yields sentences."""

from collections.abc import Iterator

from blt_titan.config.rules.bounds import shown
from blt_titan.job_config import Data, EntropyModelSettings, Failure, HashEmbeddingSettings, LocalBlocks
from blt_titan.titan import ActivationCheckpoint, Checkpoint, DataLoader, Debug, Float8Linear, Model
from parallelisms.float8 import CONVERTER


def of_loader(dataloader: DataLoader, data: Data) -> Iterator[str]:
    """Batches are made ahead by workers only, and only workers are waited for."""
    if data.wait_seconds is not None and dataloader.num_workers == 0:
        yield (
            f"data.wait_seconds = {data.wait_seconds} with training.dataloader.num_workers = 0: rows are made in the "
            "training process, which waits for no worker; leave it out, or raise num_workers"
        )
    if dataloader.prefetch_factor is not None and dataloader.num_workers == 0:
        yield (
            f"training.dataloader.prefetch_factor = {dataloader.prefetch_factor} with "
            "training.dataloader.num_workers = 0: only workers make batches ahead; leave it out, or raise num_workers"
        )


def of_export_dtype(checkpoint: Checkpoint) -> Iterator[str]:
    """Weights are rounded only in a last checkpoint of weights alone."""
    if checkpoint.export_dtype != "float32" and not checkpoint.last_save_model_only:
        yield (
            f"checkpoint.export_dtype = {checkpoint.export_dtype!r} needs checkpoint.last_save_model_only = true: a "
            "checkpoint that can be continued keeps its weights as they are"
        )


def of_initial_load(checkpoint: Checkpoint) -> Iterator[str]:
    """What is loaded of an initial checkpoint needs one."""
    if not checkpoint.initial_load_model_only and checkpoint.initial_load_path is None:
        yield "checkpoint.initial_load_model_only = false needs checkpoint.initial_load_path"


def of_checkpoints(checkpoint: Checkpoint) -> Iterator[str]:
    """A run without checkpoints begins from none."""
    if not checkpoint.enable:
        for key, default in (("load_step", -1), ("initial_load_path", None)):
            if (value := getattr(checkpoint, key)) != default:
                yield f"checkpoint.{key} = {value!r} needs checkpoint.enable = true"


def of_determinism(debug: Debug) -> Iterator[str]:
    """What is done about operations without a deterministic way is a question of deterministic runs alone."""
    if debug.deterministic_warn_only and not debug.deterministic:
        yield "debug.deterministic_warn_only = true needs debug.deterministic = true"


def of_memory_budget(activation_checkpoint: ActivationCheckpoint) -> Iterator[str]:
    """Two keys are of the mode 'memory_budget' alone."""
    if activation_checkpoint.mode == "memory_budget":
        return
    for name, default in (("memory_budget", 0.5), ("visualize_memory_budget_pareto", False)):
        if (value := getattr(activation_checkpoint, name)) != default:
            yield f"activation_checkpoint.{name} = {shown(value)} needs activation_checkpoint.mode = 'memory_budget'"


def of_float8(model: Model, float8: Float8Linear) -> Iterator[str]:
    """How float8 is done needs float8."""
    if CONVERTER in model.converters:
        return
    for name, default in (
        ("recipe_name", None),
        ("enable_fsdp_float8_all_gather", False),
        ("precompute_float8_dynamic_scale_for_fsdp", False),
        ("emulate", False),
    ):
        if (value := getattr(float8, name)) != default:
            yield f"quantize.linear.float8.{name} = {shown(value)} needs model.converters = ['{CONVERTER}']"


def of_entropy_model(model: Model, entropy_model: EntropyModelSettings) -> Iterator[str]:
    """What is about the entropy model needs a run of it."""
    if model.name != "blt_entropy" and entropy_model.reset_at_newline:
        yield f"entropy_model.reset_at_newline = true with model.name = {model.name!r}: only blt_entropy has it"


def of_hash_tables(model: Model, hash_embedding: HashEmbeddingSettings) -> Iterator[str]:
    """How hash tables are split needs a model that has some."""
    if model.name != "blt" and hash_embedding.sharding != "columns":
        yield (
            f"hash_embedding.sharding = {hash_embedding.sharding!r} with model.name = {model.name!r}: only blt has "
            "hash tables"
        )


def of_failure(failure: Failure) -> Iterator[str]:
    """How steps are skipped and spikes are judged needs that they are."""
    default = Failure()
    skips, judges = failure.on_nonfinite == "skip", failure.on_spike != "off"
    for names, used, needed in (
        (("max_skipped", "skip_window"), skips, "on_nonfinite = 'skip'"),
        (("spike_sigmas", "spike_window"), judges, "on_spike = 'warn' or 'rollback'"),
        (("rollback_steps", "max_rollbacks"), failure.on_spike == "rollback", "on_spike = 'rollback'"),
    ):
        for name in names:
            if (value := getattr(failure, name)) != getattr(default, name) and not used:
                yield f"failure.{name} = {shown(value)} needs failure.{needed}"


def of_local_blocks(model: Model, local_blocks: LocalBlocks) -> Iterator[str]:
    """What is about the local blocks needs a model that has some."""
    if model.name != "blt" and local_blocks.activation_checkpoint != "none":
        yield (
            f"local_blocks.activation_checkpoint = {local_blocks.activation_checkpoint!r} with model.name = "
            f"{model.name!r}: it has no local blocks; use activation_checkpoint.mode"
        )
