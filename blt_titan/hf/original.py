"""The original project's layout of released weights: names and configuration, read only.

    config.json {"args": {"dim_global": ..., }}, model.safetensors or consolidated*.pth        the BLT
    entropy_model/params.json {"entropy_model": ..., "data": {"patcher_args": ...}}            its entropy model,
    entropy_model/consolidated.pth                                                             or these two alone

    encoder_hash_tok_embedding.4.weight [V, d]  ->  rows 4 V .. 5 V - 1 of hash_embedding.weight
    local_encoder.layers.0.attention.wq.weight  ->  encoder.layers.0.attention.wq.weight

Hidden widths of the feed-forward layers are those of the tensors: the configuration gives a rounding rule instead.
"""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.checkpoint.json_fields import (
    BYTES,
    HASH_FUNCTIONS,
    HASH_ROWS,
    HEADS,
    LAYERS,
    NATS,
    NGRAMS,
    THETA,
    WIDTH,
    WINDOW,
    Field,
    flag,
    read_fields,
    valid_args,
    whole,
)
from blt_titan.hf.config import DEFAULT_THRESHOLD, HFConfigError, config_errors
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.layers import NORM_EPS
from blt_titan.patching.rule import PatchRule

HASH_TABLE = re.compile(r"^encoder_hash_tok_embedding\.(\d+)\.weight$")
_PREFIXES = {
    "layers.": "global_transformer.layers.",
    "encoder.layers.": "local_encoder.layers.",
    "decoder.layers.": "local_decoder.layers.",
    "encoder.cross_attention.": "local_encoder.cross_attn_layers.",
    "decoder.cross_attention.": "local_decoder.cross_attn_layers.",
    "encoder.tok_embeddings.": "local_encoder.tok_embeddings.",
    "encoder.patch_projection.": "local_encoder.patch_embedding_projection.",
    "encoder.global_projection.": "global_transformer.token_embedding_projection.",
    "decoder.patch_projection.": "local_decoder.patch_embedding_projection.",
    "decoder.norm.": "local_decoder.norm.",
    "decoder.output.": "local_decoder.output.",
}
_CROSS_NORMS = {".q_norm.": ".cross_attn_norm_q.", ".kv_norm.": ".cross_attn_norm_kv."}


_ONE_WAY_ONLY = {
    "use_rope": True,
    "cross_attn_encoder": True,
    "cross_attn_decoder": True,
    "cross_attn_init_by_pooling": True,
    "downsampling_by_pooling": "max",
    "tie_local_encoder_decoder": False,
}
"""Fields that say what our model computes in this way alone; absent or null is that way too."""
_BLT: Mapping[str, Field] = {
    "dim_local_encoder": WIDTH(),
    "dim_local_decoder": WIDTH(),
    "n_layers_local_encoder": LAYERS(),
    "n_layers_local_decoder": LAYERS(),
    "n_heads_local_encoder": HEADS(),
    "n_heads_local_decoder": HEADS(),
    "dim_global": WIDTH(),
    "n_layers_global": LAYERS(),
    "n_heads_global": HEADS(),
    "local_attention_window_len": WINDOW(),
    "cross_attn_k": whole(1, 64),
    "cross_attn_nheads": HEADS(None),
    "cross_attn_all_layers_encoder": flag(False),
    "cross_attn_all_layers_decoder": flag(),
    "encoder_hash_byte_group_size": NGRAMS(),
    "encoder_hash_byte_group_nb_functions": HASH_FUNCTIONS(),
    "encoder_hash_byte_group_vocab": HASH_ROWS(),
    "rope_theta": THETA(),
}
_ENTROPY_MODEL: Mapping[str, Field] = {
    "dim": WIDTH(),
    "n_heads": HEADS(),
    "n_layers": LAYERS(),
    # Missing or null in the released file, whose model attends over 512 bytes all the same.
    "sliding_window": WINDOW(512),
    "rope_theta": THETA(10_000.0),
}
_PATCHER: Mapping[str, Field] = {
    "threshold": NATS(DEFAULT_THRESHOLD),
    "threshold_add": NATS(None),
    "monotonicity": flag(False),
    "max_patch_length": BYTES(512),
}


def blt_name_to_original(name: str) -> str:
    """Translate a BLT parameter's name, but for the hash tables, which are several there.

    >>> blt_name_to_original("decoder.cross_attention.2.kv_norm.weight")
    'local_decoder.cross_attn_layers.2.cross_attn_norm_kv.weight'

    Raises:
        KeyError: if it is no parameter of BLT.
    """
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            translated = theirs + name.removeprefix(ours)
            if ".cross_attn_layers." in translated:
                for norm, their_norm in _CROSS_NORMS.items():
                    translated = translated.replace(norm, their_norm)
            return translated
    raise KeyError(name)


def is_original(config: Mapping[str, Any]) -> bool:
    """Tell whether a parsed `config.json` is the original project's."""
    return isinstance(config.get("args"), Mapping) and "dim_global" in config["args"]


@config_errors()
def blt_args_from_original(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> BLTArgs:
    """Read the shape of a BLT.

    Args:
        config: the parsed `config.json`.
        shapes: of the tensors, by their original names.

    Raises:
        HFConfigError: naming the field that is missing or that our model cannot express.
    """
    stored = _without_null(config["args"])
    fields = read_fields(stored, _BLT, "config.json: args.")

    def same(*names: str) -> int:
        values = {fields[name] for name in names}
        if len(values) > 1:
            raise HFConfigError(f"config.json: {' and '.join(names)} differ; both local stacks share one")
        return values.pop()

    _must_be(stored, "vocab_size", VOCAB_SIZE)
    _must_be(stored, "norm_eps", NORM_EPS)
    for name, value in _ONE_WAY_ONLY.items():
        _must_be(stored, name, value)
    for name in ("n_kv_heads", "n_kv_heads_global"):
        if stored.get(name) not in (None, stored.get("n_heads_global"), stored.get("n_heads")):
            raise HFConfigError(
                f"config.json: args.{name} = {reprlib.repr(stored[name])}: grouped-query attention is not supported"
            )
    heads = same("n_heads_local_encoder", "n_heads_local_decoder")
    args = BLTArgs(
        local_dim=same("dim_local_encoder", "dim_local_decoder"),
        local_heads=heads,
        local_window=fields["local_attention_window_len"],
        local_ffn_hidden=_width(shapes, "local_encoder.layers.0.feed_forward.w1.weight"),
        encoder_layers=fields["n_layers_local_encoder"],
        decoder_layers=fields["n_layers_local_decoder"],
        global_dim=fields["dim_global"],
        global_heads=fields["n_heads_global"],
        global_layers=fields["n_layers_global"],
        global_ffn_hidden=_width(shapes, "global_transformer.layers.0.feed_forward.w1.weight"),
        cross_attn_k=fields["cross_attn_k"],
        cross_attn_heads=fields["cross_attn_nheads"] or heads,
        encoder_cross_attn_all_layers=fields["cross_attn_all_layers_encoder"],
        decoder_cross_attn_all_layers=fields["cross_attn_all_layers_decoder"],
        hash_ngrams=tuple(fields["encoder_hash_byte_group_size"]),
        hash_functions=fields["encoder_hash_byte_group_nb_functions"],
        hash_rows=fields["encoder_hash_byte_group_vocab"],
        rope_theta=float(fields["rope_theta"]),
    )
    return valid_args(args, "config.json: args: ")


@config_errors()
def entropy_args_from_original(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> EntropyModelArgs:
    """Read the shape of an entropy model from `params.json`; `shapes` are those of its tensors.

    Raises:
        HFConfigError: naming the field that is missing or that our model cannot express.
    """
    where = "params.json: entropy_model."
    stored = params.get("entropy_model", params)
    if not isinstance(stored, Mapping):
        raise HFConfigError(f"params.json: entropy_model = {reprlib.repr(stored)}, must be an object")
    stored = _without_null(stored)
    fields = read_fields(stored, _ENTROPY_MODEL, where)
    _must_be(stored, "vocab_size", VOCAB_SIZE, where)
    _must_be(stored, "norm_eps", NORM_EPS, where)
    args = EntropyModelArgs(
        dim=fields["dim"],
        n_heads=fields["n_heads"],
        n_layers=fields["n_layers"],
        ffn_hidden=_width(shapes, "layers.0.feed_forward.w1.weight"),
        window=fields["sliding_window"],
        rope_theta=float(fields["rope_theta"]),
    )
    return valid_args(args, where)


@config_errors()
def rule_from_original(params: Mapping[str, Any]) -> PatchRule:
    """Read where patches begin from `params.json`.

    Raises:
        HFConfigError: by something else than entropies, or naming the field that is not what it should be.
    """
    where, patcher = "params.json: data.patcher_args.", params
    for name in ("data", "patcher_args"):
        patcher = patcher.get(name, {})
        if not isinstance(patcher, Mapping):
            raise HFConfigError(f"params.json: {name} = {reprlib.repr(patcher)}, must be an object")
    _must_be(patcher, "patching_mode", "entropy", where)
    fields = read_fields(_without_null(patcher), _PATCHER, where)
    threshold, limit = float(fields["threshold"]), fields["max_patch_length"]
    if fields["monotonicity"]:
        return PatchRule("monotonic", threshold=threshold, max_patch_bytes=limit)
    if (threshold_add := fields["threshold_add"]) is not None:
        return PatchRule("add", threshold=threshold, threshold_add=float(threshold_add), max_patch_bytes=limit)
    return PatchRule("global", threshold=threshold, max_patch_bytes=limit)


def _without_null(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is null, which means the same as missing here."""
    return {name: value for name, value in fields.items() if value is not None}


def _width(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if name not in shapes:
        raise HFConfigError(f"there is no tensor {name}: neither the transformers layout nor the original project's")
    if len(shapes[name]) != 2 or not 1 <= shapes[name][0] <= 2**19:
        raise HFConfigError(f"tensor {name} is {shapes[name]}, must be of two dimensions, the first 1 to {2**19}")
    return shapes[name][0]


def _must_be(fields: Mapping[str, Any], name: str, value: Any, prefix: str = "config.json: args.") -> None:
    if fields.get(name, value) != value:
        raise HFConfigError(f"{prefix}{name} = {reprlib.repr(fields[name])}, must be {value!r}")
