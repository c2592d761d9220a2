"""Our model against `transformers` on random weights: logits and every gradient, in fp32, over nine shapes."""

import os
from dataclasses import dataclass

import pytest
import torch

from blt_titan import BLT, EntropyModel
from blt_titan.hf.model_card import NEWEST_TRANSFORMERS
from blt_titan.hf.names import blt_name_to_hf, entropy_name_to_hf
from blt_titan.hf.pretrained import save_pretrained
from blt_titan.hf.verify.precision import CastsTo
from blt_titan.layout import layout_without_patches
from tests.helpers.transformers_order import in_transformers_order

transformers = pytest.importorskip("transformers", reason="install the dev extra to compare with transformers")

LOGITS_ATOL = 1e-5
"""fp32 sums in another order; measured differences stay below 3e-6 for logits of order 1."""
SAME_ORDER_ATOL = 2e-7
"""One rounding of a logit of order 1, for kernels that choose their order by alignment; measured is 0."""
GRADIENT_RTOL = 1e-4
"""Per parameter, |g - r| <= rtol * |r| + floor; rounding of sums over up to 200 positions."""
GRADIENT_FLOOR = 1e-7
"""Times the norm of all gradients: with k = 1 a byte reads one slot, so the decoder's query gradients are zero in
exact arithmetic and pure rounding noise in fp32."""


@dataclass(frozen=True)
class Shape:
    name: str
    k: int = 2
    local_dim: int = 32
    global_dim: int = 64
    encoder_layers: int = 1
    decoder_layers: int = 2
    window: int = 512
    seq_len: int = 60
    ngrams: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    functions: int = 1
    decoder_all_layers: bool = True
    patches: str = "ragged"


SHAPES = [
    Shape("k1_widths_equal", k=1, global_dim=32),
    Shape("k2_widths_equal", k=2, global_dim=64),
    Shape("k4_widths_differ", k=4, global_dim=96),
    Shape("k2_widths_differ", k=2, global_dim=32),
    Shape("window_shorter_than_row", window=16, seq_len=150),
    Shape("window_does_not_divide_row", window=13, seq_len=101),
    Shape("two_encoder_layers", encoder_layers=2, window=24, seq_len=90),
    Shape("patches_of_1_and_of_40", patches="long", seq_len=200, window=32),
    Shape("two_hash_functions_first_layer_only", functions=2, ngrams=(2, 5), decoder_all_layers=False),
]


def hf_model(shape: Shape, patcher: bool = False):
    heads = 4
    local = dict(
        hidden_size=shape.local_dim,
        num_attention_heads=heads,
        intermediate_size=48,
        cross_attn_k=shape.k,
        hidden_size_global=shape.global_dim,
    )
    config = transformers.BltConfig(
        patch_in_forward=patcher,
        cross_attn_k=shape.k,
        local_attention_window_len=shape.window,
        encoder_hash_byte_group_size=list(shape.ngrams),
        encoder_hash_byte_group_nb_functions=shape.functions,
        encoder_hash_byte_group_vocab=997,
        use_cache=False,
        encoder_config=local | dict(num_hidden_layers=shape.encoder_layers),
        decoder_config=local
        | dict(num_hidden_layers=shape.decoder_layers, cross_attn_all_layers=shape.decoder_all_layers),
        global_config=dict(
            hidden_size=shape.global_dim, num_attention_heads=heads, num_hidden_layers=2, intermediate_size=80
        ),
        patcher_config=dict(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, sliding_window=20
        ),
    )
    torch.manual_seed(0)
    model = transformers.BltForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights away from 1, so that a swapped norm shows.
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def random_rows(shape: Shape, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, S] of one document per row, and patch lengths [B, P] that sum to S + 1, ragged, right-padded."""
    generator = torch.Generator().manual_seed(1)
    S = shape.seq_len
    tokens_BS = torch.randint(4, 260, (rows, S), generator=generator)
    tokens_BS[:, 0] = 1
    lengths = []
    for row in range(rows):
        row_lengths, left = [1], S
        while left:
            if shape.patches == "long":
                length = (1, 40)[len(row_lengths) % 2]
            else:
                length = int(torch.randint(1, 6 + 3 * row, (), generator=generator))
            row_lengths.append(min(length, left))
            left -= row_lengths[-1]
        lengths.append(torch.tensor(row_lengths))
    return tokens_BS, torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)


def test_the_release_is_the_one_that_model_cards_name():
    # `make test-oldest` says that it is another.
    assert transformers.__version__ == os.environ.get("TRANSFORMERS_RELEASE", NEWEST_TRANSFORMERS)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_logits_and_gradients_agree(shape: Shape, tmp_path):
    theirs = hf_model(shape)
    theirs.save_pretrained(tmp_path)
    ours = BLT.from_pretrained(tmp_path)
    tokens_BS, lengths_BP = random_rows(shape)
    weights_BSV = torch.randn(*tokens_BS.shape, 260, generator=torch.Generator().manual_seed(2))

    our_logits = ours.logits(tokens_BS, lengths_BP)
    their_logits = theirs(tokens_BS, patch_lengths=lengths_BP, use_cache=False).logits
    torch.testing.assert_close(our_logits, their_logits, atol=LOGITS_ATOL, rtol=0)

    with torch.no_grad(), CastsTo(torch.float32):
        same_order = in_transformers_order(ours).logits(tokens_BS, lengths_BP)
    torch.testing.assert_close(same_order, their_logits, atol=SAME_ORDER_ATOL, rtol=0)
    assert torch.equal(ours.logits(tokens_BS, lengths_BP), our_logits)

    (our_logits * weights_BSV).sum().backward()
    (their_logits * weights_BSV).sum().backward()
    references = dict(theirs.named_parameters())
    floor = GRADIENT_FLOOR * torch.stack([p.grad.norm() for p in references.values()]).norm()
    for name, parameter in ours.named_parameters():
        reference = references.pop(blt_name_to_hf(name)).grad
        assert parameter.grad is not None, name
        error, size = (parameter.grad - reference).norm(), reference.norm()
        assert size > 0, name
        assert error <= GRADIENT_RTOL * size + floor, f"{name}: error {error:.1e} of {size:.1e}"
    assert not references


def test_the_order_of_transformers_is_for_one_document(tmp_path):
    hf_model(SHAPES[0]).save_pretrained(tmp_path)
    ordered = in_transformers_order(BLT.from_pretrained(tmp_path))
    ordered.logits(torch.tensor([[1, 70, 2]]), torch.tensor([[1, 2, 1]]))
    with pytest.raises(ValueError, match="a second document"):
        ordered.logits(torch.tensor([[1, 70, 2, 1]]), torch.tensor([[1, 2, 1, 1]]))


def test_entropy_model_agrees_with_the_patcher(tmp_path):
    theirs = hf_model(SHAPES[0], patcher=True)
    theirs.save_pretrained(tmp_path)
    ours = EntropyModel.from_pretrained(tmp_path)
    tokens_BS, _ = random_rows(Shape("patcher", seq_len=90))
    logits = ours(tokens_BS, layout_without_patches(torch.zeros_like(tokens_BS)))
    _, _, their_logits = theirs.model.patcher(tokens_BS, patch_size=4, threshold=1.3)
    torch.testing.assert_close(logits, their_logits, atol=LOGITS_ATOL, rtol=0)


def test_round_trip_is_bit_identical(tmp_path):
    theirs = hf_model(SHAPES[2], patcher=True)
    theirs.save_pretrained(tmp_path / "theirs")
    model, entropy_model = BLT.from_pretrained(tmp_path / "theirs"), EntropyModel.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", entropy_model=entropy_model)
    loaded, info = transformers.BltForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    again, entropy_again = BLT.from_pretrained(tmp_path / "ours"), EntropyModel.from_pretrained(tmp_path / "ours")
    assert again.args == model.args
    assert entropy_again.args == entropy_model.args
    names = [entropy_name_to_hf(n) for n, _ in entropy_again.named_parameters()]
    assert len(names) + len(list(again.parameters())) == len(list(theirs.parameters()))


def test_saved_model_computes_the_same_in_transformers(tmp_path):
    theirs = hf_model(SHAPES[4])
    theirs.save_pretrained(tmp_path / "theirs")
    BLT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    loaded = transformers.BltForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens_BS, lengths_BP = random_rows(SHAPES[4])
    with torch.no_grad():
        expected = theirs(tokens_BS, patch_lengths=lengths_BP, use_cache=False).logits
        got = loaded(tokens_BS, patch_lengths=lengths_BP, use_cache=False).logits
    assert torch.equal(got, expected)


def test_missing_and_left_over_tensors_are_errors(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_model(SHAPES[0]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.surprise"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing tensors \['lm_head.weight'\], left over \['model.surprise'\]"):
        BLT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no entropy model"):
        EntropyModel.from_pretrained(tmp_path)


def test_what_transformers_cannot_say_is_refused(tmp_path):
    from blt_titan.hf.config import HFConfigError
    from blt_titan.model.args import BLTArgs

    with torch.device("meta"):
        small = dict(local_dim=64, local_heads=4, global_dim=64, global_heads=4, global_layers=1, hash_rows=7)
        pooled_once = BLT(BLTArgs(**small, cross_attn_heads=4, encoder_layers=2, encoder_cross_attn_all_layers=True))
        other_heads = BLT(BLTArgs(**small, cross_attn_heads=2))
    with pytest.raises(HFConfigError, match="encoder_cross_attn_all_layers"):
        save_pretrained(pooled_once, tmp_path / "out")
    with pytest.raises(HFConfigError, match="cross_attn_heads"):
        save_pretrained(other_heads, tmp_path / "out")
