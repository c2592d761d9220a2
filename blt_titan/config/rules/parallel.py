"""Rules on what a model's parallelisms can do. Each yields sentences that name the settings."""

import importlib.util
import math
from collections.abc import Iterator

from blt_titan.config.rules.ranks import data_parallel
from blt_titan.config.rules.target import Target
from blt_titan.config.run_config import RunConfig
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.flavors import BLT_FLAVORS, ENTROPY_FLAVORS
from blt_titan.model.varlen import HEAD_MULTIPLE, MOST_HEAD
from blt_titan.titan import Compile, Model
from parallelisms.float8 import CONVERTER, uses_float8
from parallelisms.parallelize import compiles_model
from parallelisms.pipeline import SCHEDULES, SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES, n_stages

TENSOR, CONTEXT, PIPELINE = (f"parallelism.{axis}_parallel_degree" for axis in ("tensor", "context", "pipeline"))


def rules(config: RunConfig, world_size: int, target: Target) -> tuple[Iterator[str], ...]:
    """Return the rules, none of which has begun.

    Args:
        config: the run's settings.
        world_size: ranks of the whole job.
        target: what it shall run on.
    """
    return (
        memory_budget(config),
        components(config.compile),
        only_blt_is_split(config),
        tensor_parallel(config),
        hash_columns(config, world_size),
        segments(config),
        reshard(config),
        pipeline_schedule(config, target),
        micro_batches(config),
        pipeline_validation(config),
        float8(config, target),
        float8_all_gather(config, world_size),
        float8_rows(config),
        float8_widths(config),
        attention(config, target),
        compiled_pipeline(config),
        compiled_tensor_parallel(config, target),
    )


def flavor(model: Model) -> Iterator[str]:
    """A model has one of its sizes."""
    flavors = ENTROPY_FLAVORS if model.name == "blt_entropy" else BLT_FLAVORS
    if model.flavor not in flavors:
        yield f"model.flavor = {model.flavor!r}: {model.name} has {', '.join(flavors)}"


def _blt_args(model: Model) -> BLTArgs | None:
    """Return the sizes of a BLT; None of another model, or of no size that it has."""
    return BLT_FLAVORS.get(model.flavor) if model.name == "blt" else None


def _degrees(config: RunConfig) -> tuple[int, int, int]:
    parallelism = config.parallelism
    return (
        parallelism.context_parallel_degree,
        parallelism.tensor_parallel_degree,
        parallelism.pipeline_parallel_degree,
    )


def memory_budget(config: RunConfig) -> Iterator[str]:
    """A memory budget is kept by the compiler."""
    if config.activation_checkpoint.mode == "memory_budget" and not compiles_model(config.compile):
        yield "activation_checkpoint.mode = 'memory_budget' needs compile.enable = true"


def components(compile: Compile) -> Iterator[str]:
    """What is compiled is said."""
    if compile.enable and not compile.components:
        yield "compile.components = []: nothing would be compiled; allowed are 'model', 'loss' or both"


def only_blt_is_split(config: RunConfig) -> Iterator[str]:
    """An entropy model is split by FSDP alone."""
    if config.model.name == "blt":
        return
    for key, degree in zip((CONTEXT, TENSOR, PIPELINE), _degrees(config), strict=True):
        if degree > 1:
            yield f"{key} = {degree} with model.name = {config.model.name!r}: only blt is split that way"


def tensor_parallel(config: RunConfig) -> Iterator[str]:
    """Heads and hidden features are dealt over ranks."""
    if (args := _blt_args(config.model)) is None:
        return
    tp = config.parallelism.tensor_parallel_degree
    for what, size in (("heads", args.global_heads), ("hidden features", args.global_ffn_hidden)):
        if size % tp:
            yield (
                f"{TENSOR} = {tp} must divide the {size} {what} of the global blocks of model.flavor = "
                f"{config.model.flavor!r}"
            )


def hash_columns(config: RunConfig, world_size: int) -> Iterator[str]:
    """Columns of hash tables are dealt over the ranks of a row and of FSDP, and stay on the device."""
    if config.model.name != "blt" or config.hash_embedding.sharding != "columns":
        return
    if config.training.enable_cpu_offload:
        yield "hash_embedding.sharding = 'columns' with training.enable_cpu_offload = true: set sharding = 'fsdp'"
    args, dp = _blt_args(config.model), data_parallel(config.parallelism, world_size)
    if args is None or dp is None:
        return
    cp, tp, _ = _degrees(config)
    together = dp.shard * cp * tp
    if args.local_dim % together:
        yield (
            f"hash_embedding.sharding = 'columns' with dp_shard {dp.shard} x cp {cp} x tp {tp} = {together} ranks: "
            f"must divide the local width {args.local_dim} of model.flavor = {config.model.flavor!r}; "
            "raise parallelism.data_parallel_replicate_degree instead, or set 'fsdp'"
        )


def segments(config: RunConfig) -> Iterator[str]:
    """Whole segments of a row are dealt over its ranks; that there are whole ones is a rule of `rows`."""
    segment_bytes = config.data.segment_bytes
    cp, tp, _ = _degrees(config)
    rows = {"training.seq_len": config.training.seq_len}
    if config.validation.enable and config.validation.seq_len != -1:
        rows["validation.seq_len"] = config.validation.seq_len
    for key, seq_len in rows.items():
        count, beside = divmod(seq_len, segment_bytes)
        if not beside and count % (cp * tp):
            yield (
                f"{key} = {seq_len} / data.segment_bytes = {segment_bytes} makes {count} segments in a row, which "
                f"{CONTEXT} = {cp} x {TENSOR} = {tp} must divide"
            )


def _is_pipelined(config: RunConfig) -> bool:
    return config.model.name == "blt" and config.parallelism.pipeline_parallel_degree > 1


def reshard(config: RunConfig) -> Iterator[str]:
    """Under a pipeline, weights stay gathered."""
    if _is_pipelined(config) and config.parallelism.fsdp_reshard_after_forward == "always":
        yield (
            "parallelism.fsdp_reshard_after_forward = 'always' with "
            f"{PIPELINE} = {config.parallelism.pipeline_parallel_degree}: split-backward schedules lose gradients "
            "then; use 'default' or 'never'"
        )


def pipeline_schedule(config: RunConfig, target: Target) -> Iterator[str]:
    """A schedule has as many stages per rank as it is made for, and the model layers enough for them."""
    if not _is_pipelined(config):
        return
    parallelism, pp = config.parallelism, config.parallelism.pipeline_parallel_degree
    name, per_stage = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_layers_per_stage
    if name not in SCHEDULES:
        yield f"parallelism.pipeline_parallel_schedule = {name!r}: must be one of {', '.join(SCHEDULES)}"
        return
    if name in V_SCHEDULES and target.device_type == "cpu":
        yield f"parallelism.pipeline_parallel_schedule = {name!r} needs an accelerator: on gloo it sends to itself"
    if (args := _blt_args(config.model)) is None:
        return
    stages, n_layers = n_stages(parallelism, args.global_layers), args.global_layers
    said = _said_of_schedule(config)
    if per_stage:
        said += f" and parallelism.pipeline_parallel_layers_per_stage = {per_stage}"
    per_rank, wanted = stages / pp, "two or more"
    fits = per_rank >= 2 and stages % pp == 0
    if name in ("GPipe", "1F1B"):
        fits, wanted = per_rank == 1, "one"
    elif name in V_SCHEDULES:
        fits, wanted = per_rank == 2, "two"
    if not fits:
        yield f"{said} makes {stages} stages: it needs {wanted} per rank"
    if stages - 2 > n_layers:
        yield f"{said} makes {stages} stages, too many for the {n_layers} global layers of the model"


def micro_batches(config: RunConfig) -> Iterator[str]:
    """A batch is a whole number of micro-batches, as many as the schedule asks for."""
    parallelism, name = config.parallelism, config.parallelism.pipeline_parallel_schedule
    if not _is_pipelined(config) or name not in SCHEDULES:
        return
    rows, micro = config.training.local_batch_size, parallelism.pipeline_parallel_microbatch_size
    if rows % micro:
        yield (
            f"training.local_batch_size = {rows} must be a multiple of "
            f"parallelism.pipeline_parallel_microbatch_size = {micro}"
        )
    elif wanted := _wanted_micro_batches(name, rows // micro, parallelism.pipeline_parallel_degree):
        yield (
            f"{_said_of_schedule(config)}: training.local_batch_size = {rows} / "
            f"parallelism.pipeline_parallel_microbatch_size = {micro} makes {rows // micro} micro-batches, {wanted}"
        )


def pipeline_validation(config: RunConfig) -> Iterator[str]:
    """A pipeline is built for one length of rows."""
    training, validation = config.training, config.validation
    if _is_pipelined(config) and validation.enable and validation.seq_len not in (-1, training.seq_len):
        yield (
            f"validation.seq_len = {validation.seq_len} with {PIPELINE} = "
            f"{config.parallelism.pipeline_parallel_degree}: must be training.seq_len = {training.seq_len}"
        )


def _said_of_schedule(config: RunConfig) -> str:
    parallelism = config.parallelism
    return (
        f"parallelism.pipeline_parallel_schedule = {parallelism.pipeline_parallel_schedule!r} with {PIPELINE} = "
        f"{parallelism.pipeline_parallel_degree}"
    )


def _wanted_micro_batches(schedule: str, micro_batches: int, pp: int) -> str | None:
    """Return what torch's schedule asks of the number of micro-batches, if it is not so."""
    least = {"1F1B": pp, "DualPipeV": 2 * pp}.get(schedule, 1)
    if micro_batches < least:
        return f"which must be at least {least}"
    rounds = max(1, micro_batches // pp)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and micro_batches % rounds:
        return f"which must be a multiple of {rounds}, the rounds over {pp} ranks; a multiple of {pp} is"
    return None


def float8(config: RunConfig, target: Target) -> Iterator[str]:
    """Float8 needs its package, and a GPU that multiplies it or an emulation."""
    if not uses_float8(config.model):
        return
    settings = config.quantize.linear.float8
    if config.model.name != "blt":
        yield f"model.converters = ['{CONVERTER}'] with model.name = {config.model.name!r}: only blt is converted"
    if importlib.util.find_spec("torchao") is None:
        yield f"model.converters = ['{CONVERTER}'] needs the package torchao: pip install 'blt_titan[float8]'"
    if settings.emulate and compiles_model(config.compile):
        yield "quantize.linear.float8.emulate = true with compile.enable = true: emulation is for eager runs"
    if not settings.emulate and not target.multiplies_float8:
        yield (
            "quantize.linear.float8.emulate = false needs a GPU of compute capability 8.9 or later; emulate = true "
            "runs anywhere"
        )


def float8_all_gather(config: RunConfig, world_size: int) -> Iterator[str]:
    """Weights are gathered in float8 where they are sharded, by one scale."""
    settings = config.quantize.linear.float8
    if not uses_float8(config.model) or not settings.enable_fsdp_float8_all_gather:
        return
    if settings.recipe_name is not None:
        yield (
            f"quantize.linear.float8.recipe_name = {settings.recipe_name!r} with "
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true: only tensorwise scaling (no recipe) has it"
        )
    dp = data_parallel(config.parallelism, world_size)
    if dp is not None and dp.shard * config.parallelism.context_parallel_degree == 1:
        yield (
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true with dp_shard x cp = 1: there is nothing to "
            "gather"
        )


def float8_rows(config: RunConfig) -> Iterator[str]:
    """A multiplication in float8 takes a multiple of 16 patch slots."""
    if not uses_float8(config.model) or config.quantize.linear.float8.emulate or config.model.name != "blt":
        return
    parallelism, data = config.parallelism, config.data
    pipelined = parallelism.pipeline_parallel_degree > 1
    rows = parallelism.pipeline_parallel_microbatch_size if pipelined else config.training.local_batch_size
    segments = config.training.seq_len // data.segment_bytes
    patches = rows * segments * data.segment_patches // parallelism.context_parallel_degree
    if patches % 16:
        yield (
            f"float8 multiplies {patches} patch slots at once ({rows} rows of {segments} segments of "
            f"data.segment_patches = {data.segment_patches}, over {CONTEXT} = {parallelism.context_parallel_degree}), "
            "which must be a multiple of 16"
        )


def float8_widths(config: RunConfig) -> Iterator[str]:
    """A multiplication in float8 is a multiple of 16 wide."""
    args, tp = _blt_args(config.model), config.parallelism.tensor_parallel_degree
    if not uses_float8(config.model) or args is None:
        return
    width = math.gcd(args.global_dim, args.global_ffn_hidden) // tp
    if width % 16:
        yield f"{TENSOR} = {tp} with float8: widths of {width} per rank are not multiples of 16"


def attention(config: RunConfig, target: Target) -> Iterator[str]:
    """Kernels of attention run where they can, on what they can."""
    backend, said = config.model.attention_backend, f"model.attention_backend = {config.model.attention_backend!r}"
    if backend in ("flex", "varlen") and target.device_type == "cpu":
        yield f"{said} needs a GPU; 'sdpa' and 'auto' run on a CPU"
    if backend != "varlen":
        return
    if (degree := config.parallelism.context_parallel_degree) > 1:
        yield f"{said} with {CONTEXT} = {degree}: slices of a row have padding amid its documents; use 'flex'"
    if config.training.mixed_precision_param != "bfloat16":
        yield (
            f"{said} with training.mixed_precision_param = {config.training.mixed_precision_param!r}: FlashAttention "
            "computes in bfloat16"
        )
    if config.model.name == "blt_entropy" and config.entropy_model.reset_at_newline:
        yield f"{said} with entropy_model.reset_at_newline = true: lines of a row have no such bound; use 'flex'"
    flavors = ENTROPY_FLAVORS if config.model.name == "blt_entropy" else BLT_FLAVORS
    for name, size in _head_sizes(flavors.get(config.model.flavor)):
        if size % HEAD_MULTIPLE or size > MOST_HEAD:
            yield (
                f"{said} with model.flavor = {config.model.flavor!r}: its {name} heads are {size} wide, and "
                f"FlashAttention takes multiples of {HEAD_MULTIPLE} up to {MOST_HEAD}"
            )


def _head_sizes(args: BLTArgs | EntropyModelArgs | None) -> list[tuple[str, int]]:
    if args is None:
        return []
    if isinstance(args, EntropyModelArgs):
        return [("attention", args.dim // args.n_heads)]
    return [("local", args.local_head_dim), ("global", args.global_head_dim)]


def compiled_pipeline(config: RunConfig) -> Iterator[str]:
    """Compiled blocks have one backward."""
    schedule = config.parallelism.pipeline_parallel_schedule
    pipelined = config.parallelism.pipeline_parallel_degree > 1
    if compiles_model(config.compile) and pipelined and schedule in SPLIT_BACKWARD_SCHEDULES:
        yield (
            f"compile.enable = true with parallelism.pipeline_parallel_schedule = {schedule!r}: torch cannot split the "
            "backward of compiled blocks; use 1F1B or Interleaved1F1B, or turn compile off"
        )


def compiled_tensor_parallel(config: RunConfig, target: Target) -> Iterator[str]:
    """Tensor-parallel blocks are compiled where torch can."""
    cp, tp, _ = _degrees(config)
    if not compiles_model(config.compile) or tp == 1 or (args := _blt_args(config.model)) is None:
        return
    checkpointing = config.activation_checkpoint
    if checkpointing.mode == "memory_budget":
        yield (
            f"compile.enable = true with {TENSOR} = {tp} and activation_checkpoint.mode = 'memory_budget': torch "
            "cannot weigh what tensor-parallel blocks keep; use another mode"
        )
    chosen = config.model.attention_backend
    backend = args.attention_backend if chosen == "auto" else chosen
    if backend in ("flex", "varlen") or (backend == "auto" and target.device_type == "cuda"):
        return
    # torch sorts the random state that it keeps for such an SDPA, dropout or not, behind the tensor-parallel mesh.
    why = "torch cannot compile an SDPA that backward computes again, and other attention needs a GPU"
    if cp > 1:
        yield f"compile.enable = true with {TENSOR} = {tp} and {CONTEXT} = {cp}: {why}; turn compile off"
    elif checkpointing.mode == "full" or (
        checkpointing.mode == "selective" and checkpointing.selective_ac_option != "op"
    ):
        yield (
            f"compile.enable = true with {TENSOR} = {tp} and activation_checkpoint.mode = {checkpointing.mode!r}: "
            f"{why}; use mode 'none' or 'selective' with selective_ac_option = 'op', or turn compile off"
        )
