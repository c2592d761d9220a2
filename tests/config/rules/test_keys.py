"""Every key of a run's settings is honoured within bounds, or refused with the reason."""

import json
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import tomli_w

from blt_titan.config.check import check_run
from blt_titan.config.read import RunConfigError, load_run_config, run_config_class, settings_of
from blt_titan.config.rules.bounds import ANY
from blt_titan.config.rules.keys import refused_keys, rules

DEBUG = "train_configs/debug.toml"
KEYS = sorted(settings_of(run_config_class()()))


def hint_of(key: str) -> Any:
    cls: Any = run_config_class()
    for part in key.split("."):
        cls = get_type_hints(cls)[part]
    return cls


def kinds_of(hint: Any) -> set[Any]:
    """Return the plain types that a key takes: bool, int, float, str, list, dict or Literal."""
    options = get_args(hint) if type(None) in get_args(hint) or get_origin(hint) is not list else ()
    if get_origin(hint) in (list, dict):
        return {get_origin(hint)}
    if options and all(isinstance(option, str) for option in options):
        return {"choice"}
    return set().union(*map(kinds_of, options)) if options else {hint}


BAD_VALUES = {
    int: [-(10**30), 10**30, -2],
    float: [float("nan"), float("-inf"), -1e300],
    str: ["", "\0", "../outside", "/", "no such thing", "x" * 300],
    list: [["no such thing"]],
    dict: [{"data": -1.0}, {"data": float("nan")}],
}
OF_ANOTHER_TYPE = {
    **{int: "3", float: "3", str: 3, bool: 1, list: 3, dict: 3, "choice": "no such thing"},
    **{type(None): 3},
}
NAMED_LATER = {
    "model.flavor",
    "experimental.custom_import",
    "parallelism.pipeline_parallel_schedule",
    "job.description",
}
"""Text that is no key's own business: two are looked up where models and schedules are, one is free."""


def config_with(key: str, value: Any):
    config = load_run_config([f"--job.config_file={DEBUG}"])
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, name, value)
    return config


def test_every_key_has_a_rule_and_every_rule_a_key():
    assert sorted(rules()) == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_a_bad_value_of_any_key_is_refused_by_its_name(key):
    rule, kinds = rules()[key], kinds_of(hint_of(key)) - {type(None)}
    if rule is ANY:
        # Every value of its type is allowed, so it must be a type that bounds itself.
        assert kinds <= {bool, "choice"} or key == "compile.components", kinds
        return
    if rule.is_refused:
        bad = [
            value
            for value in (not kinds & {bool} or True, 7, "x", ["x"])
            if value != settings_of(run_config_class()())[key]
        ]
    else:
        bad = [value for kind in kinds for value in BAD_VALUES[kind]]
    refused = [sentence for value in bad for sentence in refused_keys(config_with(key, value)).values()]
    assert refused, f"no bad value of {key} is refused: {bad}"
    assert all(sentence.startswith(f"{key} = ") for sentence in refused)
    assert all("must be" in sentence or "is refused: " in sentence for sentence in refused)


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_another_type_is_refused_by_its_name(key, tmp_path):
    kinds = kinds_of(hint_of(key)) - {type(None)}
    value = OF_ANOTHER_TYPE[next(iter(sorted(kinds, key=str)))]
    if kinds >= {list, str}:
        value = 3
    table: dict[str, Any] = {}
    section = table
    for part in key.split(".")[:-1]:
        section = section.setdefault(part, {})
    section[key.split(".")[-1]] = value
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(RunConfigError, match=rf"run\.toml: {key.replace('.', '[.]')} = .* is of the wrong type"):
        load_run_config([f"--job.config_file={path}"])
    if kinds & {int, float, bool, "choice"} and str not in kinds:
        with pytest.raises(RunConfigError, match=rf"--{key.replace('.', '[.]')}=nonsense: is of the wrong type"):
            load_run_config([f"--{key}=nonsense"])


def test_all_faults_are_shown_at_once():
    data = ["--training.dataset_path=x"]
    config = load_run_config([*data, "--optimizer.lr=nan", "--training.max_norm=-1", "--training.gc_freq=0"])
    with pytest.raises(RunConfigError) as caught:
        check_run(config, world_size=1, verify_data=False)
    assert [part.split(" = ")[0] for part in caught.value.sentences] == [
        "optimizer.lr",
        "training.max_norm",
        "training.gc_freq",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--training.dataloader.num_workers=0 --training.dataloader.prefetch_factor=2", r"prefetch_factor = 2 with "),
        ("--checkpoint.export_dtype=bfloat16", r"export_dtype = 'bfloat16' needs checkpoint\.last_save_model_only"),
        ("--quantize.linear.float8.recipe_name=rowwise", r"recipe_name = 'rowwise' needs model\.converters"),
        ("--entropy_model.reset_at_newline", r"reset_at_newline = true with model\.name = 'blt'"),
        ("--model.name=blt_entropy --hash_embedding.sharding=fsdp", r"sharding = 'fsdp' with model\.name"),
        ("--lr_scheduler.total_steps=5", r"total_steps = 5: must be at least training\.steps = 600"),
        ("--profiling.enable_profiling --profiling.profile_freq=3", r"profile_freq = 3: must be at least .* = 4"),
        ("--experimental.custom_import=no_such_module", r"custom_import = 'no_such_module': cannot be imported"),
        ("--metrics.enable_wandb", r"enable_wandb = true needs the package wandb"),
        ("--checkpoint.no-enable --checkpoint.load_step=3", r"load_step = 3 needs checkpoint\.enable = true"),
        (
            "--checkpoint.no-enable --checkpoint.initial_load_path=x",
            r"initial_load_path = 'x' needs checkpoint\.enable",
        ),
        ("--checkpoint.create_seed_checkpoint --checkpoint.load_only", r"with checkpoint\.load_only = true: a seed"),
        (
            "--export.hf_every=1 --export.force --checkpoint.load_only",
            r"hf_every = 1 with checkpoint\.load_only = true",
        ),
        ("--debug.deterministic_warn_only", r"debug\.deterministic_warn_only = true needs debug\.deterministic = true"),
        ("--activation_checkpoint.memory_budget=0.3", r"memory_budget = 0\.3 needs activation_checkpoint\.mode"),
        ("--checkpoint.no-initial-load-model-only", r"model_only = false needs checkpoint\.initial_load_path"),
        ("--failure.max_skipped=3", r"max_skipped = 3 needs failure\.on_nonfinite = 'skip'"),
        ("--failure.skip_window=3", r"skip_window = 3 needs failure\.on_nonfinite = 'skip'"),
        ("--failure.spike_sigmas=3", r"spike_sigmas = 3\.0 needs failure\.on_spike = 'warn' or 'rollback'"),
        (
            "--failure.on_spike=warn --failure.rollback_steps=3",
            r"rollback_steps = 3 needs failure\.on_spike = 'rollback'",
        ),
        (
            "--failure.on_nonfinite=skip --failure.max_skipped=10 --failure.skip_window=10",
            r"max_skipped = 10: must be below failure\.skip_window = 10",
        ),
        ("--failure.on_spike=rollback --checkpoint.no-enable", r"'rollback' needs checkpoint\.enable = true"),
        ("--failure.on_spike=rollback --checkpoint.load_only", r"'rollback' with checkpoint\.load_only = true"),
        (
            "--failure.on_spike=rollback --failure.rollback_steps=301",
            r"rollback_steps = 301 with checkpoint\.keep_latest_k = 3 and checkpoint\.interval = 150: .* 300 steps old",
        ),
        (
            "--failure.on_spike=rollback --model.converters=quantize.linear.float8 "
            "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
            r"'rollback' with quantize\.linear\.float8\.precompute_float8_dynamic_scale_for_fsdp = true",
        ),
        ("--checkpoint.load_step=7", r"load_step = 7: .*checkpoint has no such step; it has none"),
    ],
)
def test_settings_that_another_one_makes_useless_are_refused(overrides, message, stdlib_data, tmp_path):
    arguments = [f"--training.dataset_path={stdlib_data}", "--data.streams=12", f"--job.dump_folder={tmp_path}"]
    config = load_run_config([f"--job.config_file={DEBUG}", *arguments, *overrides.split()])
    with pytest.raises(RunConfigError, match=message):
        check_run(config, world_size=1, verify_data=False)


def test_a_seed_of_63_bits_and_no_clipping_are_allowed():
    config = load_run_config([f"--debug.seed={2**63 - 1}", "--training.max_norm=inf", "--lr_scheduler.warmup_steps=0"])
    assert not refused_keys(config)


def test_a_number_of_thousands_of_digits_is_still_a_sentence(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[data]\nstreams = 1" + "0" * 4000)
    [sentence] = refused_keys(load_run_config([f"--job.config_file={path}"])).values()
    assert len(sentence) < 200
    assert json.dumps(sentence)


def test_torchft_is_refused_with_what_does_its_work():
    config = config_with("fault_tolerance.enable", True)
    [sentence] = refused_keys(config).values()
    assert "divided once" in sentence
    assert "--max-restarts" in sentence
