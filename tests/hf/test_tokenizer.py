"""The tokenizer by itself, and beside the one that `transformers` makes of the exported files."""

import doctest
import json

import numpy as np
import pytest
import torch

from blt_titan.hf import tokenizer as module
from blt_titan.hf.tokenizer import ByteTokenizer, tokenizer_files

TEXTS = ["to be", "é</s>\n", ""]


def test_doctests():
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_one_text_and_many():
    tokenizer = ByteTokenizer()
    assert tokenizer("to be") == {"input_ids": tokenizer.encode("to be"), "attention_mask": [1] * 6}
    many = tokenizer(TEXTS)
    assert many["input_ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer([text.encode() for text in TEXTS]) == many
    assert tokenizer("a", add_bos=False, add_eos=True)["input_ids"] == [101, 2]


@pytest.mark.parametrize(("kind", "type_"), [("pt", torch.Tensor), ("np", np.ndarray)])
def test_tensors(kind, type_):
    tokenizer = ByteTokenizer()
    one = tokenizer("to be", return_tensors=kind)
    assert all(isinstance(tensor, type_) and tensor.shape == (1, 6) for tensor in one.values())
    padded = tokenizer(TEXTS, return_tensors=kind, padding=True)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (3, 8)
    assert padded["attention_mask"].sum(1).tolist() == [6, 8, 1]
    assert set(padded["input_ids"][2, 1:].tolist()) == {ByteTokenizer.pad_id}
    assert tokenizer.batch_decode(padded["input_ids"]) == TEXTS
    with pytest.raises(ValueError, match="texts of 1 to 8 ids make no tensor: pass padding=True"):
        tokenizer(TEXTS, return_tensors=kind)
    with pytest.raises(ValueError, match="return_tensors = 'tf': must be 'pt', 'np' or None"):
        tokenizer(TEXTS, return_tensors="tf")


def test_it_gives_what_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: make setup-dev")
    for name, content in tokenizer_files(512).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = ByteTokenizer()
    expected = theirs(TEXTS, padding=True, return_tensors="pt")
    found = ours(TEXTS, padding=True, return_tensors="pt")
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert theirs.batch_decode(found["input_ids"], skip_special_tokens=True) == ours.batch_decode(found["input_ids"])
