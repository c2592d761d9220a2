"""The original project's layout of released weights: names and configuration, read only.

    config.json {"args": {"dim_global": ..., }}, model.safetensors or consolidated*.pth        the BLT
    entropy_model/params.json {"entropy_model": ..., "data": {"patcher_args": ...}}            its entropy model,
    entropy_model/consolidated.pth                                                             or these two alone

    encoder_hash_tok_embedding.4.weight [V, d]  ->  rows 4 V .. 5 V - 1 of hash_embedding.weight
    local_encoder.layers.0.attention.wq.weight  ->  encoder.layers.0.attention.wq.weight

Hidden widths of the feed-forward layers are those of the tensors: the configuration gives a rounding rule instead.
"""

import re
from collections.abc import Mapping
from typing import Any

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.interop.hf_config import DEFAULT_THRESHOLD, HFConfigError
from blt_titan.model.layers import NORM_EPS
from blt_titan.model.sizes import BLTArgs, EntropyModelArgs
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


def blt_args_from_original(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> BLTArgs:
    """Read the shape of a BLT.

    Args:
        config: the parsed `config.json`.
        shapes: of the tensors, by their original names.

    Raises:
        HFConfigError: naming the field that is missing or that our model cannot express.
    """
    fields = config["args"]

    def get(name: str) -> Any:
        if fields.get(name) is None:
            raise HFConfigError(f"config.json: args.{name} is missing")
        return fields[name]

    def same(*names: str) -> int:
        values = {int(get(name)) for name in names}
        if len(values) > 1:
            raise HFConfigError(f"config.json: {' and '.join(names)} differ; both local stacks share one")
        return values.pop()

    _must_be(fields, "vocab_size", VOCAB_SIZE)
    _must_be(fields, "norm_eps", NORM_EPS)
    for name, value in _ONE_WAY_ONLY.items():
        if fields.get(name) is not None:
            _must_be(fields, name, value)
    for name in ("n_kv_heads", "n_kv_heads_global"):
        if fields.get(name) not in (None, fields.get("n_heads_global"), fields.get("n_heads")):
            raise HFConfigError(f"config.json: args.{name} = {fields[name]}: grouped-query attention is not supported")
    heads = same("n_heads_local_encoder", "n_heads_local_decoder")
    return BLTArgs(
        local_dim=same("dim_local_encoder", "dim_local_decoder"),
        local_heads=heads,
        local_window=int(get("local_attention_window_len")),
        local_ffn_hidden=_width(shapes, "local_encoder.layers.0.feed_forward.w1.weight"),
        encoder_layers=int(get("n_layers_local_encoder")),
        decoder_layers=int(get("n_layers_local_decoder")),
        global_dim=int(get("dim_global")),
        global_heads=int(get("n_heads_global")),
        global_layers=int(get("n_layers_global")),
        global_ffn_hidden=_width(shapes, "global_transformer.layers.0.feed_forward.w1.weight"),
        cross_attn_k=int(get("cross_attn_k")),
        cross_attn_heads=int(fields.get("cross_attn_nheads") or heads),
        encoder_cross_attn_all_layers=bool(fields.get("cross_attn_all_layers_encoder", False)),
        decoder_cross_attn_all_layers=bool(get("cross_attn_all_layers_decoder")),
        hash_ngrams=tuple(int(n) for n in get("encoder_hash_byte_group_size")),
        hash_functions=int(get("encoder_hash_byte_group_nb_functions")),
        hash_rows=int(get("encoder_hash_byte_group_vocab")),
        rope_theta=float(get("rope_theta")),
    )


def entropy_args_from_original(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> EntropyModelArgs:
    """Read the shape of an entropy model from `params.json`; `shapes` are those of its tensors.

    Raises:
        HFConfigError: naming the field that is missing or that our model cannot express.
    """
    fields = params.get("entropy_model", params)
    for name in ("dim", "n_heads", "n_layers"):
        if fields.get(name) is None:
            raise HFConfigError(f"params.json: entropy_model.{name} is missing")
    _must_be(fields, "vocab_size", VOCAB_SIZE, "params.json: entropy_model.")
    _must_be(fields, "norm_eps", NORM_EPS, "params.json: entropy_model.")
    return EntropyModelArgs(
        dim=int(fields["dim"]),
        n_heads=int(fields["n_heads"]),
        n_layers=int(fields["n_layers"]),
        ffn_hidden=_width(shapes, "layers.0.feed_forward.w1.weight"),
        # Null in the released file, whose model attends over 512 bytes all the same.
        window=int(fields.get("sliding_window") or 512),
        rope_theta=float(fields.get("rope_theta") or 10_000.0),
    )


def rule_from_original(params: Mapping[str, Any]) -> PatchRule:
    """Read where patches begin from `params.json`.

    Raises:
        HFConfigError: by something else than entropies.
    """
    patcher = params.get("data", {}).get("patcher_args", {})
    if (mode := patcher.get("patching_mode", "entropy")) != "entropy":
        raise HFConfigError(f"params.json: data.patcher_args.patching_mode = {mode!r}, must be 'entropy'")
    threshold = patcher.get("threshold")
    threshold = DEFAULT_THRESHOLD if threshold is None else float(threshold)
    limit = patcher.get("max_patch_length") or 512
    if patcher.get("monotonicity"):
        return PatchRule("monotonic", threshold=threshold, max_patch_bytes=int(limit))
    if patcher.get("threshold_add") is not None:
        return PatchRule(
            "add", threshold=threshold, threshold_add=float(patcher["threshold_add"]), max_patch_bytes=int(limit)
        )
    return PatchRule("global", threshold=threshold, max_patch_bytes=int(limit))


def _width(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if name not in shapes:
        raise HFConfigError(f"there is no tensor {name}: neither the transformers layout nor the original project's")
    return shapes[name][0]


def _must_be(fields: Mapping[str, Any], name: str, value: Any, prefix: str = "config.json: args.") -> None:
    if fields.get(name, value) != value:
        raise HFConfigError(f"{prefix}{name} = {fields[name]!r}, must be {value!r}")
