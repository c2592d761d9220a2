"""Parameter names on both sides. Every parameter maps to one tensor of equal shape; nothing is permuted.

    layers.3.attention.wq.weight   <->  model.global_transformer.layers.3.self_attn.q_proj.weight
    hash_embedding.weight          <->  model.encoder_hash_tok_embedding.weight

RoPE is interleaved on both sides, so queries and keys keep their order.
"""

import re

_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CROSS = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "q_norm": "q_norm",
    "kv_norm": "k_norm",
}
_STACKS = {
    "encoder.layers": "model.local_encoder.layers",
    "decoder.layers": "model.local_decoder.layers",
    "layers": "model.global_transformer.layers",
}
_CROSS_STACKS = {
    "encoder.cross_attention": "model.local_encoder.cross_attn_layers",
    "decoder.cross_attention": "model.local_decoder.cross_attn_layers",
}
_SINGLES = {
    "hash_embedding": "model.encoder_hash_tok_embedding",
    "encoder.tok_embeddings": "model.local_encoder.embed_tokens",
    "encoder.patch_projection": "model.local_encoder.patch_embedding_projection",
    "encoder.global_projection": "model.global_transformer.token_embedding_projection",
    "decoder.patch_projection": "model.local_decoder.patch_embedding_projection",
    "decoder.norm": "model.local_decoder.norm",
    "decoder.output": "lm_head",
}
_ENTROPY_SINGLES = {
    "tok_embeddings": "model.patcher.embed_tokens",
    "norm": "model.patcher.norm",
    "output": "model.patcher.lm_head",
}
_INDEXED = re.compile(r"^(?P<stack>[a-z_.]+)\.(?P<index>\d+)\.(?P<part>[\w.]+)$")

PATCHER_PREFIX = "model.patcher."


def blt_name_to_hf(name: str) -> str:
    """Translate a BLT parameter's name.

    >>> blt_name_to_hf("encoder.cross_attention.0.kv_norm.weight")
    'model.local_encoder.cross_attn_layers.0.k_norm.weight'

    Raises:
        KeyError: if it is no parameter of BLT.
    """
    return _translate(name, _STACKS, _CROSS_STACKS, _SINGLES)


def entropy_name_to_hf(name: str) -> str:
    """Translate an entropy model parameter's name; in `transformers` the model lives inside BLT as its patcher.

    >>> entropy_name_to_hf("layers.0.feed_forward.w3.weight")
    'model.patcher.layers.0.mlp.up_proj.weight'

    Raises:
        KeyError: if it is no parameter of the entropy model.
    """
    return _translate(name, {"layers": PATCHER_PREFIX + "layers"}, {}, _ENTROPY_SINGLES)


def _translate(name: str, stacks: dict[str, str], cross_stacks: dict[str, str], singles: dict[str, str]) -> str:
    module, suffix = name.rsplit(".", 1)
    if indexed := _INDEXED.match(module):
        stack, index, part = indexed.group("stack", "index", "part")
        if stack in stacks:
            return f"{stacks[stack]}.{index}.{_BLOCK[part]}.{suffix}"
        return f"{cross_stacks[stack]}.{index}.{_CROSS[part]}.{suffix}"
    return f"{singles[module]}.{suffix}"
