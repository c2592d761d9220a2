"""What is refused at start-up, in one sentence that names the settings."""

import pytest

from blt_titan.config.check import RunConfigError, check_run, load_run_config
from blt_titan.config.rules import parallel
from blt_titan.config.rules.sound import sound
from blt_titan.config.rules.target import CARD
from blt_titan.model.args import BLTArgs
from blt_titan.model.flavors import BLT_FLAVORS
from parallelisms.parallelize import run_halo_slices
from tests.helpers.layouts import LAYOUTS, SHORT_LAYOUTS

CONFIG_FILE = "train_configs/debug.toml"
PP2 = ["parallelism.pipeline_parallel_degree=2"]
FLOAT8 = ["model.converters=quantize.linear.float8"]


def check(settings: list[str], small_run: list[str], ranks: int) -> None:
    overrides = [f"--{setting}" for setting in settings]
    config = load_run_config([f"--job.config_file={CONFIG_FILE}", *small_run, *overrides])
    check_run(config, world_size=ranks, verify_data=False)


@pytest.mark.parametrize(
    ("settings", "ranks", "named"),
    [
        (["parallelism.tensor_parallel_degree=3"], 3, ["tensor_parallel_degree = 3", "heads", "debug"]),
        (["parallelism.context_parallel_degree=4"], 4,
         ["training.seq_len", "segment_bytes", "context_parallel_degree"]),
        (["parallelism.data_parallel_shard_degree=5", "data.streams=5", "training.global_batch_size=5"], 5,
         ["hash_embedding.sharding = 'columns'", "local width 96", "data_parallel_replicate_degree"]),
        (["parallelism.context_parallel_degree=2", "model.name=blt_entropy"], 2,
         ["context_parallel_degree = 2", "model.name = 'blt_entropy'"]),
        (["model.attention_backend=flex"], 1, ["model.attention_backend = 'flex'", "needs a GPU"]),
        (["model.attention_backend=varlen"], 1, ["model.attention_backend = 'varlen'", "needs a GPU"]),
        (["model.varlen_documents=0"], 1, ["model.varlen_documents = 0"]),
        (["parallelism.expert_parallel_degree=2"], 2, ["expert_parallel_degree = 2"]),
        (["parallelism.context_parallel_rotate_method=alltoall"], 1, ["context_parallel_rotate_method = 'alltoall'"]),
        (["parallelism.context_parallel_load_balancer=headtail"], 1, ["context_parallel_load_balancer = 'headtail'"]),
        (["parallelism.enable_async_tensor_parallel"], 1, ["enable_async_tensor_parallel"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.fsdp_reshard_after_forward=always"], 2,
         ["fsdp_reshard_after_forward = 'always'", "pipeline_parallel_degree = 2"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_schedule=ZBVZeroBubble"], 2,
         ["pipeline_parallel_schedule = 'ZBVZeroBubble'", "accelerator"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_schedule=Zigzag"], 2,
         ["pipeline_parallel_schedule = 'Zigzag'"]),
        ([*PP2, "training.local_batch_size=1"], 2, ["local_batch_size = 1", "microbatch_size = 1", "at least 2"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_microbatch_size=3"], 2,
         ["local_batch_size = 4", "pipeline_parallel_microbatch_size = 3"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_schedule=zbvzerobubble"], 2,
         ["pipeline_parallel_schedule = 'zbvzerobubble'", "must be one of", "ZBVZeroBubble"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_expert_parallel_overlap"], 2,
         ["pipeline_parallel_expert_parallel_overlap = true"]),
        ([*PP2, "training.local_batch_size=5", "training.global_batch_size=5",
          "parallelism.pipeline_parallel_schedule=Interleaved1F1B"], 2,
         ["local_batch_size = 5", "multiple of 2, the rounds over 2 ranks"]),
        ([*PP2, "training.local_batch_size=4", "compile.enable",
          "parallelism.pipeline_parallel_schedule=InterleavedZeroBubble"], 2,
         ["compile.enable = true", "pipeline_parallel_schedule = 'InterleavedZeroBubble'"]),
        (["compile.enable", "compile.components="], 1, ["compile.components = []", "nothing would be compiled"]),
        (["model.name=blt_entropy", "local_blocks.activation_checkpoint=full"], 1,
         ["local_blocks.activation_checkpoint = 'full'", "model.name = 'blt_entropy'"]),
        ([*FLOAT8, "quantize.linear.float8.emulate", "quantize.linear.float8.enable_fsdp_float8_all_gather"], 1,
         ["enable_fsdp_float8_all_gather = true", "nothing to gather"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_layers_per_stage=1"], 2,
         ["pipeline_parallel_layers_per_stage = 1", "makes 3 stages"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_first_stage_less_layers=2"], 2,
         ["pipeline_parallel_first_stage_less_layers = 2", "FLOPs"]),
        (["parallelism.pipeline_parallel_degree=4", "parallelism.pipeline_parallel_schedule=Interleaved1F1B",
          "training.local_batch_size=4"], 4, ["makes 8 stages", "3 global layers"]),
        ([*PP2, "training.local_batch_size=4", "validation.enable", "validation.seq_len=512"], 2,
         ["validation.seq_len = 512", "pipeline_parallel_degree = 2"]),
        (["model.converters=quantize.linear.mx"], 1, ["quantize.linear.mx", "'quantize.linear.float8'"]),
        ([*FLOAT8], 1, ["quantize.linear.float8.emulate = false", "8.9"]),
        ([*FLOAT8, "quantize.linear.float8.emulate", "compile.enable"], 1, ["emulate = true", "compile.enable"]),
        ([*FLOAT8, "quantize.linear.float8.emulate", "quantize.linear.float8.filter_fqns=wq"], 1, ["filter_fqns"]),
        (["compile.enable", "parallelism.tensor_parallel_degree=2", "activation_checkpoint.mode=memory_budget"], 2,
         ["compile.enable = true", "tensor_parallel_degree = 2", "activation_checkpoint.mode = 'memory_budget'"]),
        (["compile.enable", "parallelism.tensor_parallel_degree=2", "activation_checkpoint.mode=full"], 2,
         ["compile.enable = true", "tensor_parallel_degree = 2", "activation_checkpoint.mode = 'full'"]),
        (["compile.enable", "parallelism.tensor_parallel_degree=2", "activation_checkpoint.mode=selective",
          "activation_checkpoint.selective_ac_option=2"], 2, ["activation_checkpoint.mode = 'selective'", "'op'"]),
        (["compile.enable", "parallelism.tensor_parallel_degree=2", "parallelism.context_parallel_degree=2",
          "training.seq_len=512"], 4, ["compile.enable = true", "tensor_parallel_degree = 2", "context_parallel"]),
    ],
    ids=lambda value: "-".join(value)[-60:] if isinstance(value, list) else str(value),
)  # fmt: skip
def test_refusals_name_the_settings(settings, ranks, named, small_run):
    with pytest.raises(RunConfigError) as refused:
        check(settings, small_run, ranks)
    for words in named:
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["parallelism.context_parallel_degree=2"], ["parallelism.context_parallel_degree = 2", "use 'flex'"]),
        (["training.mixed_precision_param=float32"], ["training.mixed_precision_param = 'float32'", "bfloat16"]),
        (["model.name=blt_entropy", "entropy_model.reset_at_newline"], ["entropy_model.reset_at_newline = true"]),
        (["model.flavor=odd"], ["local heads are 12 wide", "multiples of 8"]),
    ],
)
def test_what_runs_of_documents_cannot_do(settings, named, monkeypatch):
    monkeypatch.setitem(BLT_FLAVORS, "odd", BLTArgs(local_dim=24, local_heads=2))
    base = ["--model.attention_backend=varlen", "--training.mixed_precision_param=bfloat16"]
    assert not list(parallel.attention(load_run_config(base), CARD))
    (sentence,) = parallel.attention(load_run_config([*base, *(f"--{setting}" for setting in settings)]), CARD)
    for words in ["model.attention_backend = 'varlen'", *named]:
        assert words in sentence


@pytest.mark.parametrize("also", [[], [*FLOAT8, "quantize.linear.float8.emulate"]], ids=["plain", "float8"])
def test_what_is_not_refused(also, small_run):
    """No layout of the table, alone or with emulated float8, which is not compiled."""
    for layout in [*LAYOUTS, *SHORT_LAYOUTS]:
        if layout.compiled and also:
            continue
        settings = [override.removeprefix("--") for override in layout.overrides]
        config = load_run_config(
            [
                f"--{s}"
                for s in ["training.dataset_path=x", "data.streams=8", "training.global_batch_size=8", *settings, *also]
            ]
        )
        assert not sound(config, layout.ranks), layout.name


def test_the_halo_reaches_far_enough_for_the_shorter_rows(small_run):
    """A slice of a shorter validation row has fewer segments, so a window reaches over more of them."""
    row = ["training.seq_len=2048", "data.segment_bytes=64", "data.segment_patches=40", "patching.max_patch_bytes=32"]
    settings = [*row, "parallelism.context_parallel_degree=4"]
    long = load_run_config([f"--{s}" for s in settings])
    both = load_run_config([f"--{s}" for s in [*settings, "validation.enable", "validation.seq_len=256"]])
    # A slice has 8 segments of at least 33 bytes, and then one.
    assert run_halo_slices(long, window_bytes=64) == 1
    assert run_halo_slices(both, window_bytes=64) == 2
