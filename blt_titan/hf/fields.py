"""What is read of a `config.json` of `transformers`: each field, with its type, bounds and default."""

from collections.abc import Mapping

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
    number,
    section,
    text,
    whole,
)
from blt_titan.model.layers import NORM_EPS

DEFAULT_THRESHOLD = 1.335442066192627
"""Nats, of the released models."""
RELEASED_WINDOW = 512
"""Bytes that the released models' local stacks and patcher see."""
_ROPE: Mapping[str, Field] = {"rope_type": text("default"), "rope_theta": THETA(None, null=True)}
_STACK: Mapping[str, Field] = {
    "hidden_size": WIDTH(),
    "num_attention_heads": HEADS(),
    "num_hidden_layers": LAYERS(),
    "intermediate_size": whole(1, 2**19),
    "num_key_value_heads": HEADS(None, null=True),
    "hidden_act": text("silu"),
    "rms_norm_eps": number(0, 1, NORM_EPS),
    "rope_theta": THETA(None, null=True),
    "rope_parameters": section(_ROPE, None, null=True),
}
_WINDOWLESS: Mapping[str, Field] = {"max_position_embeddings": WINDOW(None, null=True)}
"""What is attended to where there is no window."""
STACKS: Mapping[str, Mapping[str, Field]] = {
    "encoder_config": _STACK | {"cross_attn_k": whole(1, 64, 2), "cross_attn_all_layers": flag(False), **_WINDOWLESS},
    "decoder_config": _STACK
    | {
        "cross_attn_k": whole(1, 64, 2),
        "cross_attn_all_layers": flag(True),
        "hidden_size_global": WIDTH(None, null=True),
    },
    "global_config": _STACK,
    # Where the window is missing, transformers takes the released models'; null is none.
    "patcher_config": _STACK | {"sliding_window": WINDOW(RELEASED_WINDOW, null=True), **_WINDOWLESS},
}
TOP: Mapping[str, Field] = {
    "cross_attn_k": whole(1, 64, 2),
    "local_attention_window_len": WINDOW(RELEASED_WINDOW, null=True),
    "encoder_hash_byte_group_size": NGRAMS(None, null=True),
    "encoder_hash_byte_group_nb_functions": HASH_FUNCTIONS(1),
    "encoder_hash_byte_group_vocab": HASH_ROWS(500_002),
}
PATCHING: Mapping[str, Field] = {
    "patch_in_forward": flag(True),
    "patching_threshold": NATS(DEFAULT_THRESHOLD),
    "max_patch_length": BYTES(None, null=True),
}
OURS: Mapping[str, Field] = {"entropies": text(""), "entropy_model": text(""), "reset_at_newline": flag(False)}
