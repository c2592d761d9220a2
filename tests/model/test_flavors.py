"""Flavours: parameters counted on the meta device, FLOPs from the contract, shapes that cannot be built."""

from dataclasses import fields, replace

import pytest
import torch

from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import BLT_FLAVORS, ENTROPY_FLAVORS

COUNT_RTOL = 1e-3
"""The contract's counts are rounded to four digits."""


def on_meta(model_class, args):
    with torch.device("meta"):
        return model_class(args)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("flavor", "total", "tables", "global_", "decoder", "encoder"),
    [("1B", 4.534e9, 3.072e9, 1.285e9, 158e6, 19e6), ("8B", 10.554e9, 3.840e9, 6.497e9, 183e6, 34e6)],
)
def test_parameters_of_the_released_shapes(flavor, total, tables, global_, decoder, encoder):
    args = BLT_FLAVORS[flavor]
    model = on_meta(BLT, args)
    assert args.get_nparams_and_flops(model, 16_384)[0] == count(model)
    assert count(model) == pytest.approx(total, rel=COUNT_RTOL)
    assert count(model.hash_embedding) == pytest.approx(tables, rel=COUNT_RTOL)
    # The contract counts the projection to the global width with the global transformer.
    projection = model.encoder.global_projection
    projected = 0 if projection is None else count(projection)
    assert (projected > 0) == (flavor == "8B")
    assert count(model.layers) + projected == pytest.approx(global_, rel=COUNT_RTOL)
    # Said in whole millions only.
    assert count(model.decoder) == pytest.approx(decoder, abs=0.6e6)
    assert count(model.encoder) - projected == pytest.approx(encoder, abs=0.6e6)


def test_parameters_of_the_released_entropy_model():
    args = ENTROPY_FLAVORS["100M"]
    model = on_meta(EntropyModel, args)
    assert count(model) == pytest.approx(99.5e6, rel=COUNT_RTOL)
    assert args.get_nparams_and_flops(model, 8_192)[0] == count(model)


@pytest.mark.parametrize(("flavor", "training_gflops", "rtol"), [("8B", 10.5, 0.01), ("1B", 3.02, 0.015)])
def test_training_flops_per_byte(flavor, training_gflops, rtol):
    args = BLT_FLAVORS[flavor]
    assert args.nominal_patch_bytes == 4.5
    assert 3 * args.forward_flops_per_byte(16_384, 4.5) == pytest.approx(training_gflops * 1e9, rel=rtol)
    _, flops = args.get_nparams_and_flops(on_meta(BLT, args), 16_384)
    assert flops == pytest.approx(training_gflops * 1e9, rel=rtol)


def test_a_third_of_the_1b_is_local():
    args = BLT_FLAVORS["1B"]
    no_global = args.forward_flops_per_byte(16_384, 1e12)
    assert no_global / args.forward_flops_per_byte(16_384, 4.5) == pytest.approx(1 / 3, abs=0.07)


def test_flops_of_weights_are_two_per_use():
    """With contexts and windows of nothing, what is left is 2 FLOPs per weight and use: counted from the modules."""
    args = BLTArgs(
        local_dim=64, local_heads=2, local_window=1, encoder_layers=2, decoder_layers=3, global_dim=96, global_heads=2,
        global_layers=2, cross_attn_k=2, cross_attn_heads=2, hash_rows=11, encoder_cross_attn_all_layers=True,
    )  # fmt: skip
    model = on_meta(BLT, args)
    p, d, k = 4.0, args.local_dim, args.cross_attn_k

    def matrices(module):
        return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)

    per_byte = matrices(model.encoder.layers) + matrices(model.decoder.layers) + matrices(model.decoder.output)
    per_patch = matrices(model.layers) + matrices(model.decoder.patch_projection)
    per_patch += matrices(model.encoder.patch_projection) + matrices(model.encoder.global_projection)
    n_cross = len(model.encoder.cross_attention) + len(model.decoder.cross_attention)
    # In a cross-attention two of four matrices work per byte, two per slot of a patch; k scores and sums per byte.
    cross = n_cross * (2 * 2 * d * d * (1 + k / p) + 4 * d * k)
    window = (args.encoder_layers + args.decoder_layers) * 4 * d * args.local_window
    expected = 2 * per_byte + 2 * per_patch / p + cross + window
    assert args.forward_flops_per_byte(0, p) == pytest.approx(expected, rel=1e-9)


def test_hash_tables_hold_no_flops():
    args = BLT_FLAVORS["1B"]
    for other in (replace(args, hash_rows=1_000), replace(args, hash_functions=3), replace(args, hash_ngrams=(3,))):
        assert other.forward_flops_per_byte(16_384, 4.5) == args.forward_flops_per_byte(16_384, 4.5)


def test_entropy_model_flops_are_bound_by_its_window():
    args = ENTROPY_FLAVORS["100M"]
    embedding = VOCAB_SIZE * args.dim
    matrices = count(on_meta(EntropyModel, args)) - embedding - (2 * args.n_layers + 1) * args.dim
    expected = 2 * matrices + args.n_layers * 4 * args.dim * args.window
    for context in (1_000, 100_000):
        assert args.forward_flops_per_byte(context, 1.0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("flavor", BLT_FLAVORS)
def test_every_blt_flavor_builds(flavor):
    args = BLT_FLAVORS[flavor]
    args.validate()
    n_params, flops = args.get_nparams_and_flops(on_meta(BLT, args), 16_384)
    assert n_params > args.hash_rows * args.local_dim
    assert flops > 0


@pytest.mark.parametrize("flavor", ENTROPY_FLAVORS)
def test_every_entropy_flavor_builds(flavor):
    args = ENTROPY_FLAVORS[flavor]
    args.validate()
    model = on_meta(EntropyModel, args)
    assert args.get_nparams_and_flops(model, 8192)[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        dict(local_heads=3),
        dict(local_heads=0),
        dict(local_heads=1024),  # a head of one feature has no pair to rotate
        dict(cross_attn_heads=7),
        dict(global_heads=5),
        dict(encoder_layers=0),
        dict(decoder_layers=0),
        dict(global_layers=0),
        dict(cross_attn_k=0),
        dict(local_window=0),
        dict(hash_rows=0),
        dict(hash_functions=0),
        dict(hash_functions=12),
        dict(hash_ngrams=(5, 3)),
        dict(hash_ngrams=()),
        dict(init_depth_scaling="sqrt"),
        dict(attention_backend="fast"),
    ],
    ids=str,
)
def test_impossible_blt_shapes_name_the_field(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        on_meta(BLT, BLTArgs(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_heads=7),
        dict(n_heads=768),
        dict(n_layers=0),
        dict(window=0),
        dict(init_depth_scaling="sqrt"),
        dict(attention_backend="fast"),
    ],
    ids=str,
)
def test_impossible_entropy_shapes_name_the_field(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        on_meta(EntropyModel, EntropyModelArgs(**changes))


@pytest.mark.parametrize("args_class", [BLTArgs, EntropyModelArgs])
def test_every_field_has_a_default(args_class):
    """Flavours say only what differs; `replace` of a flavour keeps its hidden widths."""
    args = args_class()
    assert args == replace(args)
    assert all(getattr(args, field.name) is not None for field in fields(args))
