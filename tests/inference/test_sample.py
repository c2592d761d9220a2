"""Sampling: what is drawn, where it ends, and that it is what recomputing the whole row at each byte gives."""

import io
import json
import sys

import numpy as np
import pytest
import torch

from blt_titan.byte_vocab import BOS_ID, EOS_ID
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.commands import generate as script
from blt_titan.hf.export import export_hf, stored_weights
from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.sample import Sampling, TextStream, sample_steps
from blt_titan.patching.rule import PatchRule
from tests.helpers.brute_force import GREEDY, complete, recomputed
from tests.helpers.generating_models import RULES, blt
from tests.helpers.small_entropy_model import model_of

SPACE = PatchRule("space", max_patch_bytes=64)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(0.7, seed=3), Sampling(1.0, top_k=5), Sampling(1.3, top_p=0.5, seed=9)], ids=str
)
def test_what_is_sampled_is_what_recomputing_gives(sampling):
    model = blt()
    expected = recomputed(model, b"to be", SPACE, 40, sampling)
    assert complete(model, b"to be", SPACE, max_bytes=40, sampling=sampling) == expected
    # The model was given back.
    assert recomputed(model, b"to be", SPACE, 40, sampling) == expected


def test_rows_of_a_batch_are_what_each_says_alone():
    prompts = [b"to be, or not", b"", b"whether 'tis nobler in the mind"]
    rule = RULES["entropy"]
    together = [b""] * 3
    for step in sample_steps(CachedBLT(blt(), rule, model_of()), prompts, max_bytes=50, sampling=Sampling(seed=4)):
        together = [text + (b"" if byte is None else bytes([byte])) for text, byte in zip(together, step, strict=True)]
    for row, prompt in enumerate(prompts):
        sampling = Sampling(seed=4 + row)
        alone = complete(blt(), prompt, rule, entropy_model=model_of(), max_bytes=50, sampling=sampling)
        assert together[row] == alone


def test_it_ends_at_eos_in_each_row(monkeypatch):
    def likely(self, logits_BV):
        p_BV = torch.zeros_like(logits_BV)
        calls.append(1)
        p_BV[0, EOS_ID if len(calls) > 2 else 70] = 1
        p_BV[1, EOS_ID if len(calls) > 5 else 71] = 1
        return p_BV

    calls: list[int] = []
    monkeypatch.setattr(Sampling, "probabilities", likely)
    steps = list(sample_steps(CachedBLT(blt(), SPACE), [b"a", b"bc"], max_bytes=20))
    assert steps == [[66, 67]] * 2 + [[None, 67]] * 3


def test_probabilities_by_hand():
    logits = torch.full((1, 260), -20.0)
    for i, p in ((100, 0.5), (101, 0.25), (102, 0.15), (EOS_ID, 0.1)):
        logits[0, i] = np.log(p)
    logits[0, BOS_ID] = 50.0  # never allowed

    def drawn(**changes):
        p_V = Sampling(**changes).probabilities(logits)[0]
        assert p_V.sum() == pytest.approx(1)
        return {i: round(float(p_V[i]), 3) for i in (100, 101, 102, EOS_ID, BOS_ID) if p_V[i] > 1e-6}

    assert drawn() == {100: 0.5, 101: 0.25, 102: 0.15, EOS_ID: 0.1}
    assert drawn(temperature=0.0) == {100: 1.0}
    assert drawn(temperature=0.5) == {100: 0.725, 101: 0.181, 102: 0.065, EOS_ID: 0.029}
    assert drawn(top_k=2) == {100: 0.667, 101: 0.333}
    assert drawn(top_p=0.49) == {100: 1.0}
    assert drawn(top_p=1e-320) == {100: 1.0}, "the likeliest stays, whatever becomes of a tiny share in fp32"
    assert drawn(top_p=0.51) == {100: 0.667, 101: 0.333}
    assert drawn(top_p=0.91) == {100: 0.5, 101: 0.25, 102: 0.15, EOS_ID: 0.1}
    for changes in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="must be"):
            Sampling(**changes)


def test_text_leaves_in_whole_characters():
    stream = TextStream()
    content = "aé€🎉".encode() + b"\xff" + b"b\xe2\x82"
    pieces = [stream.feed(bytes([byte])) for byte in content] + [stream.end()]
    assert "".join(pieces) == "aé€🎉\ufffdb\ufffd"
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "🎉", "\ufffd", "b", "\ufffd"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, entropy = blt(), model_of()
    write_checkpoint(model, "blt", model.args, folder / "blt", rule=RULES["entropy"])
    write_checkpoint(entropy, "blt_entropy", entropy.args, folder / "entropy")
    export_hf(stored_weights(folder / "blt"), folder / "hf", entropy=stored_weights(folder / "entropy"))
    return folder


def test_the_command_says_the_same_from_a_checkpoint_and_from_a_directory(saved, capsys, monkeypatch):
    arguments = ["--max-bytes", "30", "--seed", "5"]
    expected = complete(
        blt(), b"to be", RULES["entropy"], entropy_model=model_of(), max_bytes=30, sampling=Sampling(0.8, seed=5)
    )
    for model in (
        ["--model", str(saved / "hf")],
        ["--model", str(saved / "blt"), "--entropy-checkpoint", str(saved / "entropy")],
        ["--model", str(saved / "blt"), "--entropy-checkpoint", str(saved / "hf")],
    ):
        assert script.main([*model, *arguments, "--prompt", "to be", "--show-patches"]) == 0
        captured = capsys.readouterr()
        assert captured.out == expected.decode(errors="replace") + "\n"
        patches = captured.err.splitlines()[0].removeprefix("patches: ")
        assert patches.count("|") > 1
        assert captured.err.splitlines()[-1].startswith(f"{len(expected)} bytes in ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"to be")))
    assert script.main(["--model", str(saved / "hf"), *arguments, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == expected.decode(errors="replace") + "\n"


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        (["--temperature", "0"], GREEDY),
        (["--temperature", "1.3", "--top-k", "3", "--seed", "8"], Sampling(1.3, 3, seed=8)),
        (["--temperature", "1.3", "--top-p", "0.4", "--seed", "8"], Sampling(1.3, top_p=0.4, seed=8)),
    ],
    ids=str,
)
def test_the_command_s_options_of_sampling(saved, capsys, options, sampling):
    rule, prompt = RULES["entropy"], b"or not to be, that is"
    assert script.main(["--model", str(saved / "hf"), "--prompt", prompt.decode(), "--max-bytes", "24", *options]) == 0
    expected = complete(blt(), prompt, rule, entropy_model=model_of(), max_bytes=24, sampling=sampling)
    assert capsys.readouterr().out == expected.decode(errors="replace") + "\n"
    # Of a long prompt the last bytes are read.
    command = ["--model", str(saved / "hf"), "--prompt", prompt.decode(), "--max-bytes", "24", *options]
    assert script.main([*command, "--context-bytes", "9"]) == 0
    expected = complete(blt(), prompt[-9:], rule, entropy_model=model_of(), max_bytes=24, sampling=sampling)
    captured = capsys.readouterr()
    assert captured.out == expected.decode(errors="replace") + "\n"
    assert "read are the last 9" in captured.err


def test_the_command_prints_bytes_as_they_come(saved, monkeypatch):
    printed, printed_at_step = [], []
    steps = script.sample_steps

    def watched(*args, **kwargs):
        for step in steps(*args, **kwargs):
            printed_at_step.append(len(printed))
            yield step

    monkeypatch.setattr(script, "_put", printed.append)
    monkeypatch.setattr(script, "sample_steps", watched)
    assert script.main(["--model", str(saved / "hf"), "--prompt", "to be", "--max-bytes", "20"]) == 0
    # One piece for each byte, before the next is made.
    assert printed_at_step == list(range(len(printed_at_step)))
    assert len(printed_at_step) > 10


def test_the_command_takes_many_prompts_and_other_thresholds(saved, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("to be\nor not\n")
    command = ["--model", str(saved / "hf"), "--batch", str(tmp_path / "prompts.txt"), "--max-bytes", "9"]
    assert script.main([*command, "--show-patches"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["to be", "or not"]
    assert script.main([*command, "--batch-size", "1"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert script.main([*command, "--show-patches", "--threshold", "0"]) == 0
    err = capsys.readouterr().err
    assert err.splitlines()[0].count("|") > captured.err.splitlines()[0].count("|")


def test_what_is_wrong_is_said(saved, tmp_path, capsys):
    prompt = ["--prompt", "x"]
    for arguments, message in (
        (["--model", str(saved / "blt")], "name the entropy model, --entropy-checkpoint"),
        (["--model", str(saved / "entropy")], "holds an entropy model, not a BLT"),
        (["--model", str(tmp_path)], "config.json not found"),
        (["--model", str(saved / "hf"), "--top-p", "2"], "--top-p 2: must be a number above 0, at most 1"),
    ):
        assert script.main([*arguments, *prompt]) == 2
        assert message in capsys.readouterr().err
