"""Where stages are cut, against every possible cut."""

import itertools

import pytest
import torch

from blt_titan.model.blt import BLT
from blt_titan.model.flavors import BLT_FLAVORS
from parallelisms.pipeline import cut_layers


def largest(cuts, encoder, layers, decoder) -> float:
    costs = [sum(layers[cut.start : cut.stop]) for cut in cuts]
    costs[0] += encoder
    costs[-1] += decoder
    return max(costs)


def every_cut(n_layers: int, n_stages: int):
    for borders in itertools.combinations_with_replacement(range(n_layers + 1), n_stages - 1):
        cuts = [range(a, b) for a, b in itertools.pairwise([0, *borders, n_layers])]
        if all(len(cut) for cut in cuts[1:-1]):
            yield cuts


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6])
@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("encoder", "decoder"), [(0, 0), (1, 3.5), (5, 1), (0.2, 9)])
def test_no_cut_has_a_smaller_largest_stage(n_layers, n_stages, encoder, decoder):
    layers = [1.0 + 0.25 * (i % 3) for i in range(n_layers)]
    if n_stages - 2 > n_layers:
        with pytest.raises(ValueError, match=f"{n_stages} stages need at least {n_stages - 2} global layers"):
            cut_layers(encoder, layers, decoder, n_stages)
        return
    cuts = cut_layers(encoder, layers, decoder, n_stages)
    assert [i for cut in cuts for i in cut] == list(range(n_layers))
    assert len(cuts) == n_stages
    assert all(len(cut) for cut in cuts[1:-1])
    best = min(largest(other, encoder, layers, decoder) for other in every_cut(n_layers, n_stages))
    assert largest(cuts, encoder, layers, decoder) == pytest.approx(best)


@pytest.mark.parametrize(
    ("flavor", "pp", "worst_share"), [("1B", 2, 0.51), ("1B", 3, 0.35), ("8B", 4, 0.27), ("8B", 8, 0.14)]
)
def test_the_large_models_balance(flavor, pp, worst_share):
    args = BLT_FLAVORS[flavor]
    flops = args.flops_by_part(16_384, args.nominal_patch_bytes)
    layers = [flops.global_layer] * args.global_layers
    cuts = cut_layers(flops.encoder, layers, flops.decoder, pp)
    assert largest(cuts, flops.encoder, layers, flops.decoder) <= worst_share * args.forward_flops_per_byte(16_384, 4.5)


def test_stages_hold_every_parameter_once_under_its_name():
    with torch.device("meta"):
        model = BLT(BLT_FLAVORS["debug"])
    cuts = [range(0, 0), range(0, 2), range(2, 3)]
    stages = [model.stage(cut, is_first=i == 0, is_last=i == 2) for i, cut in enumerate(cuts)]
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {name.split(".")[0] for name, _ in stages[0].named_parameters()} == {"hash_embedding", "encoder"}
    assert {name.split(".")[0] for name, _ in stages[1].named_parameters()} == {"layers"}
