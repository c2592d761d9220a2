"""`generate`: one prompt or many, whole or piece by piece, and what the command says for the same seed."""

import copy
import json

import pytest
import torch

from blt_titan import BLT, generate
from blt_titan.commands import generate as command
from tests.helpers.generating_models import RULES, blt
from tests.helpers.small_entropy_model import model_of

PROMPTS = ["to be, or not", "", "whether 'tis nobler"]
OPTIONS = {"max_bytes": 30, "seed": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> BLT:
    folder = tmp_path_factory.mktemp("saved") / "hf"
    made = BLT(blt().args)
    made.load_state_dict(blt().state_dict())
    made.save_pretrained(folder, entropy_model=model_of(), rule=RULES["entropy"])
    return BLT.from_pretrained(folder)


def test_one_and_many_text_and_bytes(model):
    many = generate(model, PROMPTS, **OPTIONS)
    assert many == generate(model, PROMPTS, batch_size=1, **OPTIONS)
    assert many == [generate(model, prompt, max_bytes=30, seed=5 + row) for row, prompt in enumerate(PROMPTS)]
    as_bytes = generate(model, [prompt.encode() for prompt in PROMPTS], **OPTIONS)
    assert [content.decode(errors="replace") for content in as_bytes] == many
    assert isinstance(generate(model, b"to be", **OPTIONS), bytes)
    assert generate(model, [], **OPTIONS) == []
    assert generate(model, "x" * 9 + PROMPTS[0], context_bytes=len(PROMPTS[0]), **OPTIONS) == many[0]


def test_pieces_together_are_the_whole(model):
    pieces = list(generate(model, PROMPTS[0], stream=True, **OPTIONS))
    assert "".join(pieces) == generate(model, PROMPTS[0], **OPTIONS)
    assert len(pieces) > 5
    steps = list(generate(model, PROMPTS, stream=True, **OPTIONS))
    assert ["".join(row) for row in zip(*steps, strict=True)] == generate(model, PROMPTS, **OPTIONS)
    stream = generate(model, [prompt.encode() for prompt in PROMPTS], stream=True, **OPTIONS)
    assert [len(piece) for piece in next(stream)] == [1, 1, 1], "pieces come before the last is made"
    assert list(generate(model, [], stream=True)) == []


def test_it_is_what_the_command_says(model, tmp_path, capsys):
    arguments = ["--model", model.origin, "--max-bytes", "30", "--seed", "5"]
    assert command.main([*arguments, "--prompt", PROMPTS[0]]) == 0
    assert capsys.readouterr().out == generate(model, PROMPTS[0], **OPTIONS) + "\n"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    assert command.main([*arguments, "--batch", str(tmp_path / "prompts.txt"), "--top-k", "9"]) == 0
    lines = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert lines == generate(model, PROMPTS, top_k=9, **OPTIONS)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_are_as_they_were(model, training):
    entropy = model_of()
    used = copy.deepcopy(model).train(training)
    entropy.train(training)
    modules = [module for root in (used, entropy) for module in root.modules()]
    attributes = [dict(vars(module)) for module in modules]
    parameters = [p for root in (used, entropy) for p in root.parameters()]
    copies = [(p.detach().clone(), p.requires_grad) for p in parameters]
    generate(used, PROMPTS, entropy_model=entropy, **OPTIONS)
    next(generate(used, PROMPTS, stream=True))
    for module, before in zip(modules, attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is before[name] for name in before)
    for parameter, (copied, required) in zip(parameters, copies, strict=True):
        assert torch.equal(parameter, copied)
        assert (parameter.dtype, parameter.device) == (copied.dtype, copied.device)
        assert parameter.requires_grad is required
        assert parameter.grad is None
    assert used.training is training


def test_what_is_out_of_range_is_refused(model):
    for options, message in (
        ({"max_bytes": 0}, "max_bytes = 0: must be at least 1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 2.0}, "top_p = 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, "to be", **options)
    with pytest.raises(ValueError, match="prompts: holds int, expected text or bytes"):
        generate(model, [3])
