"""What is refused at start-up, in one sentence that names the settings."""

import pytest

from blt_titan.run_config import RunConfigError, check_run, load_run_config

CONFIG_FILE = "train_configs/debug.toml"
PP2 = ["parallelism.pipeline_parallel_degree=2", "validation.local_batch_size=-1"]
FLOAT8 = ["model.converters=quantize.linear.float8"]


def check(settings: list[str], small_run: list[str], ranks: int) -> None:
    config = load_run_config([f"--job.config_file={CONFIG_FILE}", *small_run, *(f"--{s}" for s in settings)])
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
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_layers_per_stage=1"], 2,
         ["pipeline_parallel_layers_per_stage = 1", "makes 3 stages"]),
        ([*PP2, "training.local_batch_size=4", "parallelism.pipeline_parallel_first_stage_less_layers=2"], 2,
         ["pipeline_parallel_first_stage_less_layers = 2", "FLOPs"]),
        (["parallelism.pipeline_parallel_degree=4", "parallelism.pipeline_parallel_schedule=Interleaved1F1B",
          "training.local_batch_size=4"], 4, ["makes 8 stages", "3 global layers"]),
        ([*PP2, "training.local_batch_size=4", "validation.enable", "validation.local_batch_size=2"], 2,
         ["validation.local_batch_size = 2", "pipeline_parallel_degree = 2"]),
        (["model.converters=quantize.linear.mx"], 1, ["quantize.linear.mx", "only 'quantize.linear.float8'"]),
        ([*FLOAT8], 1, ["quantize.linear.float8.emulate = false", "8.9"]),
        ([*FLOAT8, "quantize.linear.float8.emulate", "compile.enable"], 1, ["emulate = true", "compile.enable"]),
        ([*FLOAT8, "quantize.linear.float8.emulate", "quantize.linear.float8.filter_fqns=wq"], 1, ["filter_fqns"]),
        (["compile.enable", "parallelism.tensor_parallel_degree=2"], 2,
         ["compile.enable = true", "tensor_parallel_degree = 2"]),
    ],
    ids=lambda value: "-".join(value)[-60:] if isinstance(value, list) else str(value),
)  # fmt: skip
def test_refusals_name_the_settings(settings, ranks, named, small_run):
    with pytest.raises(RunConfigError) as refused:
        check(settings, small_run, ranks)
    for words in named:
        assert words in str(refused.value)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_not_refused(ranks, small_run):
    check([f"parallelism.data_parallel_shard_degree={ranks}"], small_run, ranks)
