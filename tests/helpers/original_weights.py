"""A folder as the original project released its weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from blt_titan import BLT, EntropyModel
from blt_titan.hf.original import blt_name_to_original
from tests.helpers.hf_models import ARGS, RULE, entropy_model, random_blt


def write_original(folder: Path, *, rows_of_tables: int | None = None) -> tuple[BLT, EntropyModel]:
    """Write random models with the names, fields and shapes of `facebook/blt-1b`, scaled down."""
    model, entropy = random_blt(), entropy_model()
    tensors = {
        blt_name_to_original(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name != "hash_embedding.weight"
    }
    for number, table in enumerate(model.hash_embedding.weight.detach().split(rows_of_tables or ARGS.hash_rows)):
        tensors[f"encoder_hash_tok_embedding.{number}.weight"] = table.clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    args = {
        "dim_local_encoder": 32,
        "dim_local_decoder": 32,
        "n_layers_local_encoder": 1,
        "n_layers_local_decoder": 2,
        "n_heads_local_encoder": 2,
        "n_heads_local_decoder": 2,
        "dim_global": 96,
        "n_layers_global": 2,
        "n_heads_global": 4,
        "cross_attn_k": 2,
        "cross_attn_nheads": 2,
        "cross_attn_all_layers_encoder": False,
        "cross_attn_all_layers_decoder": True,
        "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8],
        "encoder_hash_byte_group_nb_functions": 1,
        "encoder_hash_byte_group_vocab": 101,
        "local_attention_window_len": 40,
        "vocab_size": 260,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "multiple_of": 256,
    }
    (folder / "config.json").write_text(json.dumps({"args": args}))
    (folder / "entropy_model").mkdir()
    params = {
        "entropy_model": {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 2,
            "vocab_size": 260,
            "sliding_window": 24,
            "rope_theta": 10000.0,
            "norm_eps": 1e-5,
        },
        "data": {"patcher_args": {"threshold": RULE.threshold, "threshold_add": None, "monotonicity": False}},
    }
    (folder / "entropy_model" / "params.json").write_text(json.dumps(params))
    torch.save({"model": entropy.state_dict()}, folder / "entropy_model" / "consolidated.pth")
    return model, entropy
