"""Flavours: shapes by name.

A flavour is named by the parameters that compute: a 1B also carries 3.07B of hash tables, which are only looked up.
`8B` is the shape released as 7B; `1B` and `entropy 100M` are released shapes too. 400M, 2B and 4B follow the paper's
scaling table as remembered, not checked against it; 20M and 100M keep its proportions for a laptop or one GPU; `debug`
trains in minutes on two CPU cores.
"""

from blt_titan.model.args import BLTArgs, EntropyModelArgs

BLT_FLAVORS: dict[str, BLTArgs] = {
    "debug": BLTArgs(
        local_dim=96,
        local_heads=3,
        local_window=64,
        decoder_layers=2,
        global_dim=192,
        global_heads=4,
        global_layers=3,
        cross_attn_heads=3,
        hash_rows=4_001,
    ),
    "20M": BLTArgs(
        local_dim=256,
        local_heads=4,
        decoder_layers=3,
        global_dim=512,
        global_heads=8,
        global_layers=5,
        cross_attn_heads=4,
        hash_rows=20_011,
    ),
    "100M": BLTArgs(
        local_dim=384,
        local_heads=6,
        decoder_layers=5,
        global_dim=768,
        global_heads=12,
        global_layers=12,
        cross_attn_heads=6,
        hash_rows=100_003,
    ),
    "400M": BLTArgs(
        local_dim=768,
        local_heads=12,
        decoder_layers=7,
        global_dim=1280,
        global_heads=10,
        global_layers=24,
        # The scaling table gives 10, which does not divide the width of 768.
        cross_attn_heads=12,
    ),
    "1B": BLTArgs(),
    "2B": BLTArgs(global_dim=2560, global_heads=20, global_layers=26, cross_attn_k=3),
    "4B": BLTArgs(global_dim=3072, global_heads=24, global_layers=36, cross_attn_k=3),
    "8B": BLTArgs(
        local_dim=1280,
        local_heads=20,
        decoder_layers=6,
        global_dim=4096,
        global_heads=32,
        global_layers=32,
        cross_attn_k=4,
        cross_attn_heads=20,
    ),
}

ENTROPY_FLAVORS: dict[str, EntropyModelArgs] = {
    "debug": EntropyModelArgs(dim=96, n_heads=3, n_layers=2, window=128),
    "100M": EntropyModelArgs(),
}
