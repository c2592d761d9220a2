"""The bounds of every key of a run's settings: honoured within them, or refused with the reason.

In: the settings. Out: a sentence for each key whose value is not allowed. A key that no table here names is an
assertion, so that a section which gains a key cannot be ignored in silence. What two keys must be to each other is
the business of the other modules of this package.
"""

import math

from blt_titan.config.read import CONFIG_MODULE, run_config_class, settings_of
from blt_titan.config.rules.bounds import (
    AC_OPTION,
    ANY,
    BACKEND,
    FILE,
    FOLDER,
    MAX_SEED,
    PATCH_RULE,
    PATH,
    PLAIN_NAME,
    PROM_FILE,
    TEXT,
    TIMES,
    URL,
    Rule,
    number,
    one_of,
    shown,
    some_of,
    unused,
    whole,
)
from blt_titan.config.run_config import RunConfig

_NO_EXPERTS = "a BLT has no experts"
_NO_FAULT_TOLERANCE = (
    "torchft averages gradients that each group of replicas has divided by its own bytes, where here those of all "
    "ranks are divided once; blt-titan train --max-restarts starts a run again instead"
)
_NO_MX = "of quantized training only model.converters = ['quantize.linear.float8'] is supported"
_HELD_OUT = "held-out text is the 'validation' split of the training data"
_HF_WEIGHTS = "use `blt-titan import` and checkpoint.initial_load_path"

KEYS: dict[str, dict[str, Rule]] = {
    "job": {
        "config_file": PATH,
        "dump_folder": PATH,
        "description": TEXT,
        "print_config": ANY,
        "save_config_file": FILE,
        "custom_config_module": one_of("", CONFIG_MODULE),
    },
    "profiling": {
        "enable_profiling": ANY,
        "save_traces_folder": FOLDER,
        "profile_freq": whole(1),
        "profiler_active": whole(1),
        "profiler_warmup": whole(0),
        "enable_memory_snapshot": ANY,
        "save_memory_snapshot_folder": FOLDER,
    },
    "metrics": {
        "log_freq": whole(1),
        "enable_tensorboard": ANY,
        "disable_color_printing": ANY,
        "save_tb_folder": FOLDER,
        "save_for_all_ranks": ANY,
        "enable_wandb": ANY,
    },
    "model": {
        "name": ANY,
        "flavor": TEXT,
        "attention_backend": ANY,
        "varlen_documents": whole(1, 2**20),
        "hf_assets_path": unused("bytes need no tokenizer"),
        "tokenizer_path": unused("bytes need no tokenizer"),
        "converters": some_of("quantize.linear.float8"),
        "print_after_conversion": ANY,
    },
    "optimizer": {
        "name": one_of("Adam", "AdamW"),
        "lr": number(0, above=True),
        "beta1": number(0, 1, below=True),
        "beta2": number(0, 1, below=True),
        "eps": number(0, above=True),
        "weight_decay": number(0),
        "implementation": ANY,
        "early_step_in_backward": unused("gradients are clipped together before the optimizer steps"),
    },
    "lr_scheduler": {
        "warmup_steps": whole(0),
        "total_steps": whole(1),
        "decay_ratio": number(0, 1),
        "decay_type": ANY,
        "min_lr_factor": number(0, 1),
    },
    "training": {
        "dataset": unused("training text is training.dataset_path, or data.mixture"),
        "dataset_path": PATH,
        "local_batch_size": whole(1, 2**20),
        "global_batch_size": whole(1, or_value=-1, why=" for no accumulation"),
        "seq_len": whole(1),
        "max_norm": number(0, above=True, inf=True),
        "steps": whole(1, 10**12),
        "enable_cpu_offload": ANY,
        "dtype": ANY,
        "mixed_precision_param": ANY,
        "mixed_precision_reduce": ANY,
        "gc_freq": whole(1),
        "gc_debug": ANY,
        "dataloader.num_workers": whole(0, 1024),
        "dataloader.persistent_workers": unused("workers live as long as the run"),
        "dataloader.pin_memory": ANY,
        "dataloader.prefetch_factor": whole(1, 2**20),
    },
    "parallelism": {
        "data_parallel_replicate_degree": whole(1),
        "data_parallel_shard_degree": whole(1, or_value=-1, why=" for the ranks that are left"),
        "fsdp_reshard_after_forward": ANY,
        "tensor_parallel_degree": whole(1),
        "disable_loss_parallel": unused("logits of bytes are few and never split over ranks"),
        "enable_async_tensor_parallel": unused("asynchronous tensor parallelism is not supported"),
        "pipeline_parallel_degree": whole(1),
        "module_fqns_per_model_part": unused("stages are cut by their FLOPs"),
        "pipeline_parallel_first_stage_less_layers": unused("stages are cut by their FLOPs"),
        "pipeline_parallel_last_stage_less_layers": unused("stages are cut by their FLOPs"),
        "pipeline_parallel_layers_per_stage": whole(1),
        "pipeline_parallel_schedule": TEXT,
        "pipeline_parallel_schedule_csv": unused("schedules are chosen by parallelism.pipeline_parallel_schedule"),
        "pipeline_parallel_microbatch_size": whole(1),
        "pipeline_parallel_expert_parallel_overlap": unused(_NO_EXPERTS),
        "context_parallel_degree": whole(1),
        "context_parallel_load_balancer": unused("slices of a row are contiguous"),
        "context_parallel_rotate_method": unused("keys and values are gathered"),
        "expert_parallel_degree": unused(_NO_EXPERTS),
        "expert_tensor_parallel_degree": unused(_NO_EXPERTS),
        "expert_parallel_comm_backend": unused(_NO_EXPERTS),
    },
    "checkpoint": {
        "enable": ANY,
        "enable_ft_dataloader_checkpoints": unused(_NO_FAULT_TOLERANCE),
        "folder": FOLDER,
        "interval": whole(1, 10**12),
        "initial_load_path": PATH,
        "initial_load_model_only": ANY,
        "initial_load_in_hf": unused(_HF_WEIGHTS),
        "initial_load_in_hf_quantized": unused(_HF_WEIGHTS),
        "last_save_model_only": ANY,
        "last_save_in_hf": unused("use [export] hf_every, or `blt-titan export`"),
        "export_dtype": ANY,
        "async_mode": ANY,
        "keep_latest_k": whole(2, or_value=0, why=" to keep all: of one alone, the last may be half written"),
        "load_step": whole(0, 10**12, or_value=-1, why=" for the newest"),
        "exclude_from_loading": some_of("optimizer", "lr_scheduler", "dataloader"),
        "enable_first_step_checkpoint": ANY,
        "create_seed_checkpoint": ANY,
        "load_only": ANY,
    },
    "activation_checkpoint": {
        "mode": ANY,
        "selective_ac_option": AC_OPTION,
        "per_op_sac_force_recompute_mm_shapes_by_fqns": unused("a BLT has no router"),
        "early_stop": ANY,
        "memory_budget": number(0, 1),
        "visualize_memory_budget_pareto": ANY,
        "preserve_rng_state": ANY,
        "determinism_check": one_of("default", "none"),
        "debug": ANY,
    },
    "compile": {
        "enable": ANY,
        "components": ANY,
        "backend": BACKEND,
    },
    "quantize": {
        "linear.float8.enable_fsdp_float8_all_gather": ANY,
        "linear.float8.precompute_float8_dynamic_scale_for_fsdp": ANY,
        "linear.float8.recipe_name": ANY,
        "linear.float8.filter_fqns": unused("exactly the linears of the global transformer are converted"),
        "linear.float8.emulate": ANY,
        "linear.mx.mxfp8_dim1_cast_kernel_choice": unused(_NO_MX),
        "linear.mx.recipe_name": unused(_NO_MX),
        "linear.mx.filter_fqns": unused(_NO_MX),
        "grouped_mm.float8.fqns": unused(_NO_MX),
        "grouped_mm.mx.recipe_name": unused(_NO_MX),
        "grouped_mm.mx.fqns": unused(_NO_MX),
    },
    "comm": {
        "init_timeout_seconds": whole(1, 10**7),
        "train_timeout_seconds": whole(1, 10**7),
        "trace_buf_size": whole(0),
        "save_traces_folder": FOLDER,
        "save_traces_file_prefix": PLAIN_NAME,
        "mode": unused("only communication between real ranks is supported"),
    },
    "memory_estimation": {
        "enable": unused("torchtitan's estimate does not know this model"),
        "disable_fake_mode": unused("torchtitan's estimate does not know this model"),
    },
    "fault_tolerance": {
        "enable": unused(_NO_FAULT_TOLERANCE),
        "process_group": unused(_NO_FAULT_TOLERANCE),
        "process_group_timeout_ms": unused(_NO_FAULT_TOLERANCE),
        "replica_id": unused(_NO_FAULT_TOLERANCE),
        "group_size": unused(_NO_FAULT_TOLERANCE),
        "min_replica_size": unused(_NO_FAULT_TOLERANCE),
        "semi_sync_method": unused(_NO_FAULT_TOLERANCE),
    },
    "experimental": {
        "custom_import": TEXT,
        "custom_args_module": unused("torchtitan deprecates it"),
    },
    "validation": {
        "enable": ANY,
        "dataset": unused(_HELD_OUT),
        "dataset_path": unused(_HELD_OUT),
        "local_batch_size": whole(1, 2**20, or_value=-1, why=" for the training value"),
        "seq_len": whole(1, or_value=-1, why=" for the training value"),
        "freq": whole(1, 10**12),
        "steps": whole(1, or_value=-1, why=" for the whole split"),
        "dataloader.num_workers": unused("held-out rows are made in the training process"),
        "dataloader.persistent_workers": unused("held-out rows are made in the training process"),
        "dataloader.pin_memory": unused("held-out rows are made in the training process"),
        "dataloader.prefetch_factor": unused("held-out rows are made in the training process"),
    },
    "debug": {
        "seed": whole(0, MAX_SEED),
        "deterministic": ANY,
        "deterministic_warn_only": ANY,
        "moe_force_load_balance": unused(_NO_EXPERTS),
    },
    "data": {
        "streams": whole(1),
        "segment_bytes": whole(2),
        "segment_patches": whole(2),
        "mixture": Rule(lambda table: all(number(0, above=True).allows(w) for w in table.values()), "weights above 0"),
        "seed": whole(0, MAX_SEED),
        "on_damage": ANY,
        "verify_bytes_at_start": whole(0, MAX_SEED),
        "wait_seconds": whole(1, 10**7),
        "cache_dir": PATH,
        "cache_bytes": whole(1, 2**60),
        "fetch_ahead": whole(0, 1024),
        "fetch_timeout_s": number(0, 10**6, above=True),
    },
    "patching": {
        "rule": PATCH_RULE,
        "stride": whole(1),
        "threshold": number(-math.inf),
        "threshold_add": number(-math.inf),
        "source": ANY,
        "sidecar": PLAIN_NAME,
        "entropy_checkpoint": PATH,
        "max_patch_bytes": whole(1),
        "allow_change": ANY,
    },
    "hash_embedding": {"sharding": ANY},
    "entropy_model": {"reset_at_newline": ANY},
    "local_blocks": {"activation_checkpoint": ANY},
    "export": {
        "hf_every": whole(0),
        "dtype": ANY,
        "entropy_checkpoint": PATH,
        "force": ANY,
    },
    "monitor": {
        "slow_rank": TIMES,
        "data_wait": number(0, 1),
        "throughput_drop": number(0, 1),
        "gradient_spike": TIMES,
        "saving": number(0, 1),
        "predicted_memory_gib": number(0, above=True),
        "repeat_s": whole(0),
        "webhook": URL,
        "prometheus_textfile": PROM_FILE,
        "prometheus_port": whole(1, 65535),
    },
    "failure": {
        "on_nonfinite": ANY,
        "max_skipped": whole(1),
        "skip_window": whole(2, 10**12),
        "on_spike": ANY,
        "spike_sigmas": number(0, above=True),
        "spike_window": whole(2, 10**12),
        "rollback_steps": whole(1, 10**12),
        "max_rollbacks": whole(1),
    },
    "heartbeat": {"limit_seconds": whole(1, 10**7)},
}


def rules() -> dict[str, Rule]:
    """Return the rule of every key by its dotted name."""
    return {f"{section}.{name}": rule for section, keys in KEYS.items() for name, rule in keys.items()}


def refused_keys(config: RunConfig) -> dict[str, str]:
    """Return the keys whose values are not allowed, each with a sentence: the key, what was given, what is allowed."""
    known, defaults = rules(), settings_of(run_config_class()())
    values = settings_of(config)
    assert values.keys() == known.keys(), f"keys without a rule: {values.keys() ^ known.keys()}"
    refused: dict[str, str] = {}
    for key, value in values.items():
        rule = known[key]
        if rule.is_refused:
            if value != defaults[key]:
                refused[key] = f"{key} = {shown(value)} is refused: {rule.allowed}; leave it out"
        elif not rule.allows(value):
            refused[key] = f"{key} = {shown(value)}: must be {rule.allowed}"
    return refused
