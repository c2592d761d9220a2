"""Likelihoods of documents against a forward of each window alone; scores of data; noise."""

import json
import math

import numpy as np
import pytest

from blt_titan.byte_vocab import document_ids
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.commands import evaluate as script
from blt_titan.data.prepare.documents import read_documents
from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.errors import DataError
from blt_titan.evaluation.documents import bootstrap_interval, evaluate_documents
from blt_titan.evaluation.noise import NOISES, add_noise
from blt_titan.hf.export import export_hf, stored_weights
from blt_titan.hf.verify.verify import TEXT
from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.likelihood import LikelihoodScorer
from tests.helpers.brute_force import by_hand, complete
from tests.helpers.generating_models import RULES, blt
from tests.helpers.small_entropy_model import model_of

NATS_ATOL = 1e-4
"""Per byte; fp32 logits of padded batches and of rows alone differ by rounding."""

TEXTS = [TEXT.encode(), b"x", TEXT.encode()[200:260], b"\xff\x00 not text \xfe", TEXT[::-1].encode() * 2]

# A window for each byte takes long; one rule shows it.
CASES = [(name, *sizes) for name in ("entropy", "monotonic", "space") for sizes in ((8192, 4096), (64, 20), (50, 50))]


@pytest.mark.parametrize(("name", "context", "stride"), [*CASES, ("monotonic, uint8", 64, 20), ("space", 2, 1)])
def test_every_byte_is_scored_once_with_its_context(name, context, stride):
    rule = RULES[name]
    documents = [document_ids(text).astype(np.int64) for text in TEXTS]
    scorer = LikelihoodScorer(
        blt(), rule, model_of() if rule.by_entropy else None, context_bytes=context, stride_bytes=stride
    )
    found = dict(scorer.score(documents))
    assert sorted(found) == list(range(len(TEXTS)))
    for number, ids in enumerate(documents):
        nats, likeliest = by_hand(ids, rule, context, stride)
        np.testing.assert_allclose(found[number].nats, nats, atol=NATS_ATOL, rtol=0)
        assert (found[number].likeliest == likeliest).mean() > 0.99
    assert any(found[number].likeliest.any() for number in found)


def test_sizes_that_cannot_be_are_refused():
    for context, stride in ((1, 1), (8, 9), (8, 0)):
        with pytest.raises(ValueError, match="the context must be at least 2"):
            LikelihoodScorer(blt(), RULES["space"], context_bytes=context, stride_bytes=stride)
    with pytest.raises(ValueError, match="needs an entropy model"):
        LikelihoodScorer(blt(), RULES["entropy"])


def test_one_pair_of_models_may_score_and_generate_in_turn():
    model, entropy_model, rule = blt(), model_of(), RULES["entropy"]
    ids = document_ids(TEXTS[0])
    scorer, generator = LikelihoodScorer(model, rule, entropy_model), CachedBLT(model, rule, entropy_model)
    first = dict(scorer.score([ids]))[0].nats
    generator.prefill([ids[:40]])
    assert np.array_equal(dict(scorer.score([ids]))[0].nats, first)
    text = complete(model, b"to be", rule, entropy_model=entropy_model, max_bytes=20)
    assert text == complete(blt(), b"to be", rule, entropy_model=model_of(), max_bytes=20)


def test_scores_by_source_and_their_interval(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXTS[0])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t.decode()}) + "\n" for t in (TEXTS[1], TEXTS[2])))
    documents = [d for name in ("a.txt", "b.jsonl") for d in read_documents(tmp_path / name)]
    scorer = LikelihoodScorer(blt(), RULES["space"])
    scored = evaluate_documents(scorer, documents)
    assert list(scored) == [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    nats, _ = by_hand(document_ids(TEXTS[0]).astype(np.int64), RULES["space"], 8192, 4096)
    summary = scored[str(tmp_path / "a.txt")].summary()
    assert summary["bits_per_byte"] == pytest.approx(nats[:-1].sum() / math.log(2) / len(TEXTS[0]), rel=1e-5)
    assert summary["eos_nats_per_document"] == pytest.approx(nats[-1], abs=1e-4)
    assert summary["bits_per_byte_95"] is None  # of one document
    starts = RULES["space"].mark(document_ids(TEXTS[0]))
    assert summary["mean_patch_bytes"] == pytest.approx(len(starts) / starts.sum())

    # The standard error of a ratio, by linearisation.
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 1000, 400)
    nats = sizes * rng.normal(1.0, 0.2, 400)
    ratio = nats.sum() / sizes.sum()
    error = 1.96 * np.sqrt(((nats - ratio * sizes) ** 2).sum()) / sizes.sum() / math.log(2)
    low, high = bootstrap_interval(nats, sizes)
    assert high - low == pytest.approx(2 * error, rel=0.1)
    assert low < ratio / math.log(2) < high


def test_what_noise_leaves_nothing_of_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x"}) + "\n" for _ in range(60)))
    documents = list(read_documents(tmp_path / "a.jsonl"))
    scored = evaluate_documents(LikelihoodScorer(blt(), RULES["space"]), documents, noise="drop")
    summary = scored[str(tmp_path / "a.jsonl")].summary()
    assert 40 < summary["documents"] < 60
    assert summary["bytes"] == summary["documents"]
    assert math.isfinite(summary["bits_per_byte"])


def test_documents_of_shards_know_their_sources(tmp_path):
    for name, texts in (("one", [b"first text", b""]), ("two", [b"second text", b"third"])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.txt").write_bytes(text)
    prepare([tmp_path / "one", tmp_path / "two"], tmp_path / "data", validation_fraction=0, seed=0, progress=False)
    found = sorted((d.source, d.text) for d in read_documents(tmp_path / "data", split="train"))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert found == [(one, b"first text"), (two, b"second text"), (two, b"third")]
    for side in ("left", "right"):
        (tmp_path / side / "wiki").mkdir(parents=True)
        (tmp_path / side / "wiki" / "0.txt").write_text(side)
    twins = [tmp_path / side / "wiki" for side in ("left", "right")]
    prepare(twins, tmp_path / "twins", validation_fraction=0, seed=0, progress=False)
    found = sorted((d.source, d.text) for d in read_documents(tmp_path / "twins", split="train"))
    assert found == [(str(twins[0]), b"left"), (str(twins[1]), b"right")]
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        list(read_documents(tmp_path / "bad.jsonl"))


def test_the_command(tmp_path, capsys):
    model, entropy = blt(), model_of()
    write_checkpoint(model, "blt", model.args, tmp_path / "blt", rule=RULES["entropy"])
    write_checkpoint(entropy, "blt_entropy", entropy.args, tmp_path / "entropy")
    export_hf(stored_weights(tmp_path / "blt"), tmp_path / "hf", entropy=stored_weights(tmp_path / "entropy"))
    for name, text in (("a.txt", TEXTS[0]), ("b.txt", TEXTS[4])):
        (tmp_path / name).write_bytes(text)
    data = ["--data", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--out", str(tmp_path / "out.json")]
    assert script.main(["--model", str(tmp_path / "hf"), *data]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1].rpartition("/")[2] for line in printed[1:]] == ["a.txt", "b.txt", "all"]
    result = json.loads((tmp_path / "out.json").read_text())
    scorer = LikelihoodScorer(model, RULES["entropy"], entropy)
    [(_, alone)] = scorer.score([document_ids(TEXTS[0])])
    expected = alone.nats[:-1].sum() / math.log(2) / len(TEXTS[0])
    assert result["sources"][str(tmp_path / "a.txt")]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert result["sources"]["all"]["documents"] == 2

    assert script.main(["--model", str(tmp_path / "hf"), *data, "--noise", "uppercase", "--threshold", "0.5"]) == 0
    noisy = json.loads((tmp_path / "out.json").read_text())
    assert noisy["patching"]["threshold"] == 0.5
    of_noisy, of_plain = noisy["sources"]["all"], result["sources"]["all"]
    assert of_noisy["mean_patch_bytes"] < of_plain["mean_patch_bytes"]
    assert of_noisy["bits_per_byte"] != of_plain["bits_per_byte"]
    assert script.main(["--model", str(tmp_path / "hf"), "--data", str(tmp_path / "nothing")]) == 2
    assert "blt-titan evaluate: error: " in capsys.readouterr().err


def test_noises():
    text = "Straße 123, ok?\n" * 200
    changed = {noise: add_noise(text.encode(), noise, seed=1).decode() for noise in NOISES}
    assert changed["uppercase"] == text.upper()
    assert changed["antspeak"] == " ".join(text.upper())
    assert 0.07 < 1 - len(changed["drop"]) / len(text) < 0.13
    letters = [c for c in changed["random_case"] if c.isalpha()]
    assert 0.4 < sum(c.isupper() for c in letters) / len(letters) < 0.6
    assert changed["random_case"].lower().replace("ss", "ß") == text.lower().replace("ss", "ß")
    assert 1.3 < len(changed["repeat"]) / len(text) < 1.5
    for noise in NOISES:
        assert add_noise(text.encode(), noise, seed=1) == changed[noise].encode()
        assert add_noise(b"\xff\x00", noise, seed=3).strip(b" \xff\x00") == b""
    assert add_noise(text.encode(), "drop", seed=2) != changed["drop"].encode()
    with pytest.raises(ValueError, match="must be one of antspeak"):
        add_noise(b"", "whisper", seed=0)
