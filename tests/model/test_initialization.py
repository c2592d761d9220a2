"""Initial weights: every parameter set, by seed and name alone, with the contract's spread."""

import math

import pytest
import torch

from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.initialization import initialize

STD_RTOL = 0.05
"""A normal cut at 3 std has 0.987 of its std; matrices of at least 4,000 draws estimate it within 2 %."""


def args(**changes) -> BLTArgs:
    shape = dict(
        local_dim=64,
        local_heads=2,
        local_ffn_hidden=96,
        encoder_layers=2,
        decoder_layers=3,
        global_dim=96,
        global_heads=2,
        global_layers=4,
        global_ffn_hidden=160,
        cross_attn_heads=2,
        hash_ngrams=(3, 5),
        hash_rows=501,
    )
    return BLTArgs(**(shape | changes))


def materialize(model_class, model_args):
    """Build on meta, fill with NaN, draw: what a trainer does, with memory that shows what was left out."""
    with torch.device("meta"):
        model = model_class(model_args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))
    model.init_weights(buffer_device=None)
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


MODELS = [
    (BLT, args()),
    (BLT, args(encoder_cross_attn_all_layers=True, init_depth_scaling="current")),
    (BLT, args(decoder_cross_attn_all_layers=False, global_dim=128, init_depth_scaling="total")),
    (EntropyModel, EntropyModelArgs(dim=64, n_heads=2, n_layers=3, window=8)),
]
every_model = pytest.mark.parametrize(("model_class", "model_args"), MODELS, ids=["blt", "all", "first", "entropy"])


@every_model
def test_every_parameter_is_set(model_class, model_args):
    model = materialize(model_class, model_args)
    assert not list(model.buffers())
    for name, weight in weights(model).items():
        assert not weight.isnan().any(), name
        assert model.get_parameter(name).requires_grad


def expected_std(name: str, model_args: BLTArgs) -> float:
    """The contract's list, by name."""
    d, G = model_args.local_dim, model_args.global_dim
    width = G if name.startswith("layers.") else d
    hidden = model_args.global_ffn_hidden if name.startswith("layers.") else model_args.local_ffn_hidden
    match name.split(".")[-2]:
        case "wq" | "wk" | "wv" | "wo" | "w1" | "w3":
            return width**-0.5
        case "w2":
            return hidden**-0.5
        case "tok_embeddings" | "hash_embedding" | "output":
            return d**-0.5
        case "patch_projection":
            return (d if name.startswith("encoder") else G) ** -0.5
        case "global_projection":
            return model_args.patch_dim**-0.5
    raise AssertionError(f"the contract says nothing about {name}")


def test_spread_is_the_contracts():
    model_args = args()
    for name, weight in weights(materialize(BLT, model_args)).items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = expected_std(name, model_args)
        assert float(weight.std()) == pytest.approx(0.987 * std, rel=STD_RTOL), name
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
        assert weight.abs().max() <= 3 * std * 1.0001, name
        # Cut, not clamped: nothing piles up at the edge, yet the tail beyond 2 std is there.
        assert (weight.abs() >= 3 * std * 0.9999).float().mean() < 1e-3, name
        assert float((weight.abs() > 2 * std).float().mean()) == pytest.approx(0.0429, abs=0.012), name


def test_seed_decides_and_nothing_else():
    first = weights(materialize(BLT, args(init_seed=5)))
    torch.manual_seed(99)
    again = weights(materialize(BLT, args(init_seed=5)))
    others = [weights(materialize(BLT, args(init_seed=seed))) for seed in (6, 5 + 2**32)]
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        for other in others if weight.ndim == 2 else []:
            # Not only different: drawn anew. The CPU's generator reads 32 bits of a seed, which once hid ours.
            assert abs(float(torch.corrcoef(torch.stack([weight.flatten(), other[name].flatten()]))[0, 1])) < 0.1, name


def test_init_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    materialize(BLT, args())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_two_parameters_are_the_same():
    seen = {}
    for name, weight in weights(materialize(BLT, args())).items():
        if weight.ndim == 2:
            key = tuple(weight.flatten()[:8].div(weight.std()).mul(1e3).round().tolist())
            assert key not in seen, f"{name} equals {seen.get(key)}"
            seen[key] = name


def is_block_output(name: str) -> bool:
    return "layers." in name and name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))


@pytest.mark.parametrize("scaling", ["current", "total"])
def test_depth_scaling_divides_block_outputs_only(scaling):
    model_args = args(init_depth_scaling=scaling)
    depths = {
        "encoder.layers": model_args.encoder_layers,
        "layers": model_args.global_layers,
        "decoder.layers": model_args.decoder_layers,
    }
    plain, scaled = weights(materialize(BLT, args())), weights(materialize(BLT, model_args))
    divided = 0
    for name, weight in plain.items():
        if not is_block_output(name):
            assert torch.equal(scaled[name], weight), name
            continue
        stack, _, rest = name.rpartition("layers.")
        depth = int(rest.split(".")[0]) if scaling == "current" else depths[stack + "layers"]
        torch.testing.assert_close(scaled[name] * math.sqrt(2 * (depth + 1)), weight, msg=lambda m, n=name: f"{n}: {m}")
        divided += 1
    assert divided == 2 * sum(depths.values())


@pytest.mark.parametrize("removed", [["encoder"], ["encoder", "hash_embedding", "decoder"]])
def test_values_depend_on_the_name_not_on_the_other_parts(removed):
    """A pipeline stage that holds some parts draws what the whole model draws there."""
    model_args = args(init_depth_scaling="total")
    whole = weights(materialize(BLT, model_args))
    part = BLT(model_args)
    for name in removed:
        setattr(part, name, None)
    del part.layers["0"], part.layers["2"]
    part.init_weights()
    kept = weights(part)
    assert kept
    assert {name.split(".")[0] for name in kept}.isdisjoint(removed)
    for name, weight in kept.items():
        assert torch.equal(weight, whole[name]), name


def test_names_of_wrapped_modules_count_as_plain():
    plain = weights(materialize(BLT, args()))
    model = BLT(args())
    for name, block in list(model.layers.items()):
        wrapper = torch.nn.Module()
        wrapper._checkpoint_wrapped_module = torch.nn.Module()
        wrapper._checkpoint_wrapped_module._orig_mod = block
        model.layers[name] = wrapper
    model.init_weights()
    wrapped = weights(model)
    assert "layers.0._checkpoint_wrapped_module._orig_mod.attention.wq.weight" in wrapped
    for name, weight in wrapped.items():
        assert torch.equal(weight, plain[name.replace("_checkpoint_wrapped_module._orig_mod.", "")]), name


def test_columns_of_hash_tables_are_independent_of_each_other():
    """Column c is the same draw whatever the width, so a rank that holds some columns needs no others."""
    narrow = weights(materialize(BLT, args(local_dim=64)))["hash_embedding.weight"]
    wide = weights(materialize(BLT, args(local_dim=128)))["hash_embedding.weight"]
    torch.testing.assert_close(wide[:, :64] * math.sqrt(2), narrow)
    # Uncorrelated: 1,002 rows give a correlation of 0.03 by chance.
    off_diagonal = torch.corrcoef(wide.T) - torch.eye(128)
    assert off_diagonal.abs().max() < 0.2


def test_write_decides_what_a_rank_keeps():
    """A rank that keeps half of the columns has half of the single process's, and draws no more of the hash tables."""
    model = BLT(args())
    whole = weights(materialize(BLT, args()))
    halves = {}

    def keep_right_half(parameter, full):
        assert full.shape == parameter.shape
        assert not full.requires_grad
        halves[id(parameter)] = full[..., full.shape[-1] // 2 :].clone()

    def right_half(parameter):
        columns = range(parameter.shape[1] // 2, parameter.shape[1])
        halves[id(parameter)] = torch.empty(parameter.shape[0], len(columns))
        return halves[id(parameter)], columns

    depths = {"encoder.layers": 2, "layers": 4, "decoder.layers": 3}
    initialize(
        model, seed=0, depth_scaling="none", stack_depths=depths, write=keep_right_half, local_columns=right_half
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(halves[id(parameter)], whole[name][..., whole[name].shape[-1] // 2 :]), name
