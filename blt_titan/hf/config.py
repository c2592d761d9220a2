"""`config.json` of a `transformers` BltForCausalLM <-> our model arguments.

Reading refuses what our model cannot compute; writing states every field, because the other side's defaults differ
from what the released models use (`rms_norm_eps`, the encoder's hidden width, the window).
"""

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from blt_titan.byte_vocab import BOS_ID, EOS_ID, RESERVED_ID, VOCAB_SIZE
from blt_titan.checkpoint.json_fields import FieldError, read_fields, read_rule, refuse_unknown, section, valid_args
from blt_titan.hf.fields import DEFAULT_THRESHOLD, OURS, PATCHING, STACKS, TOP
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.layers import NORM_EPS
from blt_titan.patching.rule import PatchRule

LEAST_MAX_PATCH_BYTES = 256
"""From here on a limit of patches is so rarely reached that `transformers` may do without."""
OUR_KEY = "blt_titan"
"""In config.json, beside the fields of `transformers`: the whole rule of the patches, and two fingerprints."""
BESIDE = "entropy_model"
"""The folder of an entropy model that is not inside as the patcher of `transformers`."""
PATCHER_ALONE = "blt_patcher"
"""The `model_type` of a directory that holds an entropy model alone."""
_DEFAULT_THETA = {"patcher_config": 10_000.0}
_WHERE = "config.json: "


class HFConfigError(ValueError):
    """A config.json that our model cannot express, or a model that config.json cannot express."""


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn errors of fields into those of a configuration."""
    try:
        yield
    except FieldError as error:
        raise HFConfigError(str(error)) from error


@config_errors()
def blt_args_from_hf(config: dict[str, Any]) -> BLTArgs:
    """Read the shape of a BLT.

    Args:
        config: the parsed `config.json`.

    Returns:
        Arguments for `BLT`.

    Raises:
        HFConfigError: naming the field that is missing or that our model cannot express.
    """
    _require(config, "model_type", "blt")
    _require(config, "vocab_size", VOCAB_SIZE)
    encoder, decoder, global_ = (_stack(config, name) for name in ("encoder_config", "decoder_config", "global_config"))
    _same("hidden_size", encoder, decoder)
    _same("num_attention_heads", encoder, decoder)
    _same("intermediate_size", encoder, decoder)
    thetas = {
        _theta(stack, name)
        for name, stack in (("encoder_config", encoder), ("decoder_config", decoder), ("global_config", global_))
    }
    if len(thetas) > 1:
        raise HFConfigError(f"rope_theta differs between the stacks: {sorted(thetas)}; ours share one")
    top = read_fields(config, TOP, _WHERE)
    k = top["cross_attn_k"]
    for name, stack in (("encoder_config", encoder), ("decoder_config", decoder)):
        if stack["cross_attn_k"] != k:
            raise HFConfigError(f"{name}.cross_attn_k = {stack['cross_attn_k']} but cross_attn_k = {k}")
    if decoder["hidden_size_global"] not in (None, global_["hidden_size"]):
        raise HFConfigError(
            f"decoder_config.hidden_size_global = {decoder['hidden_size_global']} but "
            f"global_config.hidden_size = {global_['hidden_size']}"
        )
    if encoder["cross_attn_all_layers"] and encoder["num_hidden_layers"] > 1:
        raise HFConfigError(
            "encoder_config.cross_attn_all_layers with more than one encoder layer: transformers pools the "
            "patches anew at each layer, our model (as the original) keeps their state"
        )
    # Null is no window; where the field is missing, transformers takes the released models'.
    window = top["local_attention_window_len"]
    args = BLTArgs(
        local_dim=encoder["hidden_size"],
        local_heads=encoder["num_attention_heads"],
        # Without a window, one that no row exceeds.
        local_window=window if window is not None else encoder["max_position_embeddings"] or 24576,
        local_ffn_hidden=encoder["intermediate_size"],
        encoder_layers=encoder["num_hidden_layers"],
        decoder_layers=decoder["num_hidden_layers"],
        global_dim=global_["hidden_size"],
        global_heads=global_["num_attention_heads"],
        global_layers=global_["num_hidden_layers"],
        global_ffn_hidden=global_["intermediate_size"],
        cross_attn_k=k,
        cross_attn_heads=encoder["num_attention_heads"],
        decoder_cross_attn_all_layers=decoder["cross_attn_all_layers"],
        hash_ngrams=tuple(top["encoder_hash_byte_group_size"] or (3, 4, 5, 6, 7, 8)),
        hash_functions=top["encoder_hash_byte_group_nb_functions"],
        hash_rows=top["encoder_hash_byte_group_vocab"],
        rope_theta=thetas.pop(),
    )
    return valid_args(args, _WHERE)


@config_errors()
def entropy_args_from_hf(config: dict[str, Any]) -> EntropyModelArgs:
    """Read the shape of the patcher, our entropy model.

    Raises:
        HFConfigError: naming the field that is missing or that our model cannot express.
    """
    patcher = _stack(config, "patcher_config")
    window = patcher["sliding_window"]
    args = EntropyModelArgs(
        dim=patcher["hidden_size"],
        n_heads=patcher["num_attention_heads"],
        n_layers=patcher["num_hidden_layers"],
        ffn_hidden=patcher["intermediate_size"],
        window=window if window is not None else patcher["max_position_embeddings"] or 8192,
        rope_theta=_theta(patcher, "patcher_config"),
    )
    return valid_args(args, _WHERE + "patcher_config: ")


def why_not_by_itself(entropy_args: EntropyModelArgs | None, rule: PatchRule | None) -> str | None:
    """Return why `transformers` cannot cut a text as this model was trained to; None if it can.

    Its patcher knows one threshold for the whole text; any other mode means one-byte patches, without a word.
    """
    if rule is None:
        return "the rule of its patches is not known (directories of others may not say it; --threshold does)"
    if rule.rule != "global":
        return (
            f"patching.rule = {rule.rule!r}: transformers cuts only where the entropy is above one threshold ('global')"
        )
    if entropy_args is None:
        return "there is no entropy model, so transformers could not cut a text"
    if entropy_args.reset_at_newline:
        return "entropy_model.reset_at_newline: the patcher of transformers cannot forget at newlines"
    if rule.max_patch_bytes is not None and rule.max_patch_bytes < LEAST_MAX_PATCH_BYTES:
        return (
            f"patching.max_patch_bytes = {rule.max_patch_bytes}: transformers does not split long patches, and below "
            f"{LEAST_MAX_PATCH_BYTES} that would matter"
        )
    return None


def own_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read what stands under our key: `patching` or None, `entropies` and `entropy_model`, fingerprints or empty.

    Of an entropy model alone also `reset_at_newline`, for which `transformers` has no field.

    Raises:
        HFConfigError: naming the field that is not what it should be, or is not known.
    """
    with config_errors():
        ours = config.get(OUR_KEY)
        if ours is None:
            ours = {}
        if not isinstance(ours, Mapping):
            raise FieldError(f"{_WHERE}{OUR_KEY} = {reprlib.repr(ours)}, must be an object")
        refuse_unknown(ours, ["patching", *OURS], f"{_WHERE}{OUR_KEY}.")
        found = read_fields(ours, OURS, f"{_WHERE}{OUR_KEY}.")
        patching = ours.get("patching")
        rule = None if patching is None else read_rule(patching, f"{_WHERE}{OUR_KEY}.patching")
        return found | {"patching": rule}


@config_errors()
def rule_from_hf(config: dict[str, Any]) -> PatchRule | None:
    """Read where patches begin; None if the model needs explicit lengths and does not say.

    What `transformers` has no field for stands under a key of ours, which it passes over. Where it cuts texts itself,
    its own field of the threshold is the one that counts.

    Raises:
        HFConfigError: naming the field that means something else here.
    """
    rule, fields = own_fields(config)["patching"], read_fields(config, PATCHING, _WHERE)
    if not fields["patch_in_forward"]:
        return rule
    _require(config, "patching_mode", "entropy")
    if rule is None:
        rule = PatchRule("global", max_patch_bytes=fields["max_patch_length"] or 512)
    if rule.rule != "global":
        raise HFConfigError(f"{OUR_KEY}.patching.rule = {rule.rule!r}, but patch_in_forward = true means 'global'")
    return replace(rule, threshold=float(fields["patching_threshold"]))


def hf_config(
    args: BLTArgs,
    entropy_args: EntropyModelArgs | None,
    rule: PatchRule | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    entropies: str = "",
    entropy_model: str = "",
) -> dict[str, Any]:
    """Write the shape of a BLT, and of its entropy model if it has one, as `config.json` holds it.

    Args:
        args: of the BLT.
        entropy_args: of the entropy model that becomes the patcher; None for a model that needs `patch_lengths`.
        rule: where patches begin; None leaves the threshold of the released models.
        dtype: of the weights.
        entropies: the fingerprint of the entropy model that the training text was cut with, if that is known.
        entropy_model: the fingerprint of the one that becomes the patcher.

    Raises:
        HFConfigError: naming what `transformers` cannot express.
    """
    _require_expressible(args)
    config: dict[str, Any] = {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": RESERVED_ID,
        # With a cache, transformers' generation fails or is silently wrong.
        "use_cache": False,
        "max_position_embeddings": 4096,
        "max_patch_length": None,
        "local_attention_window_len": args.local_window,
        "cross_attn_k": args.cross_attn_k,
        "encoder_hash_byte_group_size": list(args.hash_ngrams),
        "encoder_hash_byte_group_vocab": args.hash_rows,
        "encoder_hash_byte_group_nb_functions": args.hash_functions,
        "patch_in_forward": entropy_args is not None,
        "patching_mode": "entropy",
        # Any number but null: it has no effect beside the threshold, without it the patcher makes one-byte patches.
        "patch_size": 4,
        "patching_threshold": DEFAULT_THRESHOLD if rule is None or rule.threshold is None else float(rule.threshold),
        **_rope_fields(args.rope_theta),
        **_stack_configs(args),
    }
    if entropy_args is not None:
        config["patcher_config"] = entropy_config(entropy_args)
    if rule is not None:
        fingerprints = {"entropies": entropies, "entropy_model": entropy_model}
        config[OUR_KEY] = {"patching": rule.as_dict()} | {key: value for key, value in fingerprints.items() if value}
    return config


def _require_expressible(args: BLTArgs) -> None:
    if args.encoder_cross_attn_all_layers and args.encoder_layers > 1:
        raise HFConfigError(
            "encoder_cross_attn_all_layers with more than one encoder layer: transformers pools the patches anew "
            "at each layer, our model keeps their state"
        )
    if args.cross_attn_heads != args.local_heads:
        raise HFConfigError(
            f"cross_attn_heads = {args.cross_attn_heads} but local_heads = {args.local_heads}: transformers has one "
            "field for both"
        )


def _stack_configs(args: BLTArgs) -> dict[str, Any]:
    """Write encoder, decoder and global transformer as `config.json` holds them."""
    local = {
        **_stack_fields(args.local_dim, args.local_heads, args.local_ffn_hidden, args.rope_theta),
        "vocab_size": VOCAB_SIZE,
        "cross_attn_k": args.cross_attn_k,
        "hidden_size_global": args.global_dim,
        "max_position_embeddings": 24576,
        "sliding_window": args.local_window,
    }
    return {
        "encoder_config": {
            **local,
            "model_type": "blt_local_encoder",
            "num_hidden_layers": args.encoder_layers,
            "cross_attn_all_layers": args.encoder_cross_attn_all_layers,
        },
        "decoder_config": {
            **local,
            "model_type": "blt_local_decoder",
            "num_hidden_layers": args.decoder_layers,
            "cross_attn_all_layers": args.decoder_cross_attn_all_layers,
        },
        "global_config": {
            **_stack_fields(args.global_dim, args.global_heads, args.global_ffn_hidden, args.rope_theta),
            "model_type": "blt_global_transformer",
            "num_hidden_layers": args.global_layers,
            "max_position_embeddings": 4096,
        },
    }


def entropy_config(args: EntropyModelArgs) -> dict[str, Any]:
    """Write the shape of an entropy model as `patcher_config` holds it.

    Raises:
        HFConfigError: naming what `transformers` cannot express.
    """
    if args.reset_at_newline:
        raise HFConfigError("entropy_model.reset_at_newline: the patcher of transformers cannot forget at newlines")
    return {
        **_stack_fields(args.dim, args.n_heads, args.ffn_hidden, args.rope_theta),
        "model_type": "blt_patcher",
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": args.n_layers,
        "max_position_embeddings": 8192,
        "sliding_window": args.window,
    }


def _stack_fields(dim: int, heads: int, hidden: int, theta: float) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": hidden,
        "rms_norm_eps": NORM_EPS,
        "hidden_act": "silu",
        "dropout": 0.0,
        "tie_word_embeddings": False,
        **_rope_fields(theta),
    }


def _rope_fields(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


def _stack(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Read the fields of a stack; the defaults of other libraries differ, so its sizes must be there."""
    stack = read_fields(config, {name: section(STACKS[name])}, _WHERE)[name]
    heads = stack["num_attention_heads"]
    if stack["num_key_value_heads"] not in (None, heads):
        raise HFConfigError(
            f"{name}.num_key_value_heads = {stack['num_key_value_heads']}: grouped-query attention is not supported, "
            f"it must be {heads}"
        )
    _require(stack, "hidden_act", "silu", prefix=f"{name}.")
    _require(stack, "rms_norm_eps", NORM_EPS, prefix=f"{name}.")
    return stack


def _theta(stack: Mapping[str, Any], name: str) -> float:
    rope = stack["rope_parameters"] or {"rope_type": "default", "rope_theta": None}
    if rope["rope_type"] != "default":
        raise HFConfigError(f"{name}.rope_parameters.rope_type = {rope['rope_type']!r}: only 'default' is supported")
    return float(rope["rope_theta"] or stack["rope_theta"] or _DEFAULT_THETA.get(name, 500_000.0))


def _require(config: dict[str, Any], field: str, value: Any, prefix: str = "") -> None:
    if config.get(field, value) != value:
        raise HFConfigError(f"{prefix}{field} = {reprlib.repr(config[field])}, must be {value!r}")


def _same(field: str, encoder: dict[str, Any], decoder: dict[str, Any]) -> None:
    if encoder[field] != decoder[field]:
        raise HFConfigError(
            f"encoder_config.{field} = {encoder[field]} but decoder_config.{field} = {decoder[field]}; "
            "both local stacks share one"
        )
