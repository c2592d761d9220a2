"""EleutherAI's harness with tasks of our own, against likelihoods by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blt_titan.byte_vocab import BOS_ID, bytes_to_ids
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.hf.export import export_hf, stored_weights
from blt_titan.hf.verify.verify import TEXT
from blt_titan.patching import starts_to_lengths
from tests.helpers.brute_force import GREEDY, by_hand, complete, recomputed
from tests.helpers.generating_models import RULES, blt
from tests.helpers.small_entropy_model import model_of, scored_alone

pytest.importorskip("lm_eval", reason="install the dev extra to run EleutherAI's harness")

from blt_titan.commands import harness as script
from blt_titan.evaluation.harness import BYTES_PER_TOKEN, BLTHarness

LOG_P_ATOL = 1e-3
"""Per continuation of some ten bytes, each off by fp32 rounding of about 1e-5."""
RULE = RULES["entropy"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    model, entropy = blt(), model_of()
    write_checkpoint(model, "blt", model.args, folder / "blt", rule=RULE)
    write_checkpoint(entropy, "blt_entropy", entropy.args, folder / "entropy")
    export_hf(stored_weights(folder / "blt"), folder / "hf", entropy=stored_weights(folder / "entropy"))
    return folder


def log_p(content: bytes, last: int) -> float:
    """Sum log p of the last bytes of a text, in one row."""
    ids = np.concatenate([[BOS_ID], bytes_to_ids(content)]).astype(np.int64)
    entropies = scored_alone(model_of(), ids).astype(np.float16).astype(np.float32)
    starts = RULE.mark(ids[:-1], entropies[:-1], include_next=True)
    with torch.no_grad():
        logits = blt().logits(torch.from_numpy(ids[:-1])[None], torch.from_numpy(starts_to_lengths(starts))[None])[0]
    return float(sum(logits.log_softmax(-1)[i, ids[i + 1]] for i in range(len(ids) - 1 - last, len(ids) - 1)))


def requests(*arguments):
    return [SimpleNamespace(args=pair) for pair in arguments]


def test_likelihoods_are_those_by_hand(directory):
    harness = BLTHarness(str(directory / "hf"), max_length=120)
    pairs = [
        ("The answer is", " yes"),
        ("The answer is", " no, it is not"),
        ("", "empty context"),
        ("ends in a space ", "é"),
        (TEXT, " and so on"),  # longer than the model reads
        ("nothing follows", ""),
    ]
    found = harness.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (got, greedy) in zip(pairs, found, strict=True):
        content, last = (context + continuation).encode()[-120:], len(continuation.encode())
        assert got == pytest.approx(log_p(content, last), abs=LOG_P_ATOL), (context, continuation)
        assert greedy == (not continuation)
    # A context whose greedy continuation is ASCII, so that a str can hold it.
    likely = {i: recomputed_greedy(f"The answer {i} is".encode(), 2) for i in range(40)}
    number, text = next((i, text) for i, text in likely.items() if text.isascii() and len(text) == 2)
    other = text.decode()[0] + chr(ord("a") + (text[1] == ord("a")))
    pairs = [(f"The answer {number} is", continuation) for continuation in (text.decode(), other)]
    found = harness.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]

    texts = ["short", TEXT[:100], ""]
    rolling = harness.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    for text, got in zip(texts, rolling, strict=True):
        assert got == pytest.approx(log_p(text.encode(), len(text.encode())) if text else 0, abs=LOG_P_ATOL * 10)
    # Longer than the model reads: windows, each byte once, patches of the whole text.
    [long] = harness.loglikelihood_rolling(requests((TEXT,)), disable_tqdm=True)
    ids = np.concatenate([[BOS_ID], bytes_to_ids(TEXT.encode())]).astype(np.int64)
    nats, _ = by_hand(ids, RULE, context=120, stride=60)
    assert long == pytest.approx(-nats.sum(), rel=1e-5)


def recomputed_greedy(prompt: bytes, max_bytes: int) -> bytes:
    return complete(blt(), prompt, RULE, entropy_model=model_of(), max_bytes=max_bytes, sampling=GREEDY)


def test_the_harness_knows_it_by_name(directory):
    from lm_eval.api.registry import get_model

    assert get_model("blt_titan") is BLTHarness
    harness = BLTHarness.create_from_arg_string(f"pretrained={directory / 'hf'},max_length=120")
    [(got, _)] = harness.loglikelihood(requests(("The answer is", " yes")), disable_tqdm=True)
    assert got == pytest.approx(log_p(b"The answer is yes", 4), abs=LOG_P_ATOL)


def test_of_a_long_prompt_the_last_bytes_are_continued(directory):
    harness = BLTHarness(str(directory / "hf"), max_length=120)
    [found] = harness.generate_until(requests((TEXT, {"max_gen_toks": 3})), disable_tqdm=True)
    room = 120 - 1 - 3 * BYTES_PER_TOKEN
    expected = recomputed_greedy(TEXT.encode()[-room:], 3 * BYTES_PER_TOKEN)
    assert found == expected.decode(errors="replace")
    assert expected != recomputed_greedy(TEXT.encode()[:room], 3 * BYTES_PER_TOKEN)


def test_it_continues_until_a_stop(directory, caplog):
    harness = BLTHarness(str(directory / "hf"), batch_size=2)
    prompts = ["to be", "or not to be, that is", "x"]
    limit = -(-30 // BYTES_PER_TOKEN)
    whole = [recomputed_greedy(prompt.encode(), limit * BYTES_PER_TOKEN) for prompt in prompts]
    settings = {"until": [], "max_gen_toks": limit}
    with caplog.at_level("WARNING"):
        found = harness.generate_until(requests(*((p, settings) for p in prompts)), disable_tqdm=True)
    assert "3 of 3 answers reached the limit" in caplog.text
    assert found == [content.decode(errors="replace") for content in whole]
    # A byte that the first continuation holds and the others, perhaps, do not.
    stop = next(chr(byte) for byte in whole[0][3:] if byte < 128)
    stopped = {"until": [stop], "max_gen_toks": limit}
    [cut] = harness.generate_until(requests(("to be", stopped)), disable_tqdm=True)
    assert cut == whole[0].partition(stop.encode())[0].decode(errors="replace")
    mixed = harness.generate_until(
        requests(("to be", stopped), ("x", settings), ("to be", settings)), disable_tqdm=True
    )
    assert mixed == [cut, found[2], found[0]]
    # By the harness's own reading, no sampling unless it is asked for; and each request draws on its own.
    assert harness.generate_until(
        requests(("to be", {"do_sample": False, "temperature": 1.0, "max_new_tokens": limit})), disable_tqdm=True
    ) == [found[0]]
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_gen_toks": 20}
    drawn = harness.generate_until(requests(*([("to be", sampled)] * 3)), disable_tqdm=True)
    assert len(set(drawn)) == 3
    with pytest.raises(ValueError, match="leaves no room"):
        harness.generate_until(requests(("x", {"max_gen_toks": 9000})), disable_tqdm=True)


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "continuation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["zzzz"], "max_gen_toks": 2},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_a_task_of_our_own(directory, tmp_path, capsys):
    examples = [
        {"question": f"Number {i}: the sky is", "choices": [" blue", " green and large", " 3"], "answer": i % 3}
        for i in range(6)
    ]
    for example in examples:
        made = recomputed_greedy(example["question"].encode(), 2 * BYTES_PER_TOKEN).decode(errors="replace")
        example["continuation"] = made if example["answer"] else "something else"
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    for name, task in TASKS.items():
        task = {
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "examples.jsonl")}},
            "test_split": "test",
            **task,
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    command = ["--model", str(directory / "hf"), "--include-path", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert script.main([*command, "--tasks", "own_choices", "own_perplexity", "own_continuation"]) == 0
    assert "own_choices" in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    right = 0
    for example in examples:
        scores = [log_p((example["question"] + c).encode(), len(c)) for c in example["choices"]]
        right += int(np.argmax(scores)) == example["answer"]
    assert results["own_choices"]["acc,none"] == pytest.approx(right / len(examples))
    total = sum(log_p(e["question"].encode(), len(e["question"])) for e in examples)
    n_bytes = sum(len(e["question"]) for e in examples)
    expected = -total / n_bytes / math.log(2)
    assert results["own_perplexity"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)

    assert results["own_continuation"]["exact_match,none"] == pytest.approx(4 / 6)

    assert script.main([*command, "--tasks", "own_nothing"]) == 2
    assert "the harness has no task own_nothing" in capsys.readouterr().err
    assert script.main([*command, "--tasks", "paper"]) == 2
    assert "mbpp, humaneval: runs code that the model wrote" in capsys.readouterr().err


def test_the_paper_s_tasks_are_known_to_the_harness():
    """Their data cannot be downloaded here; that the names and settings load can be seen."""
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    assert set(script.PAPER_TASKS) <= set(known)


def test_noise_changes_what_is_read(directory):
    plain = BLTHarness(str(directory / "hf"))
    for where, pair in (
        ("prompt", ("THE ANSWER", " is")),
        ("completion", ("the answer", " IS")),
        ("both", ("THE ANSWER", " IS")),
    ):
        noisy = BLTHarness(str(directory / "hf"), noise="uppercase", noise_on=where)
        found = noisy.loglikelihood(requests(("the answer", " is")), disable_tqdm=True)
        assert found == plain.loglikelihood(requests(pair), disable_tqdm=True)
    # Figures per byte are of the bytes that were read, though the harness divides by those without noise.
    noisy = BLTHarness(str(directory / "hf"), noise="antspeak")
    [found], [expected] = (
        harness.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
        for harness, text in ((noisy, "the answer"), (plain, "T H E   A N S W E R"))
    )
    assert found / len("the answer") == pytest.approx(expected / len("T H E   A N S W E R"), rel=1e-9)
    # An option's noise is another one after another question.
    noisy = BLTHarness(str(directory / "hf"), noise="random_case", noise_on="both")
    questions = [f"question {i}" for i in range(9)]
    assert len({noisy._completion(question, " some option") for question in questions}) > 3
    # Noise never leaves an option empty: that would be certain.
    noisy = BLTHarness(str(directory / "hf"), noise="drop", noise_on="completion")
    assert {noisy._completion(f"question {i}", "A") for i in range(99)} == {b"A"}
    with pytest.raises(ValueError, match="noise = 'whisper'"):
        BLTHarness(str(directory / "hf"), noise="whisper")


def test_likelihoods_after_generation(directory):
    """Other tasks of one call come with batches of other sizes."""
    harness = BLTHarness(str(directory / "hf"), batch_size=3)
    pairs = requests(*((f"context {i}" * 9, " and more") for i in range(4)))
    before = harness.loglikelihood(pairs, disable_tqdm=True)
    harness.generate_until(requests(*(("x" * i, {"max_gen_toks": 2}) for i in range(3))), disable_tqdm=True)
    assert harness.loglikelihood(pairs, disable_tqdm=True) == before


def test_wrong_arguments_are_named(directory):
    with pytest.raises(ValueError, match="knows no model argument pretrainde"):
        BLTHarness(str(directory / "hf"), pretrainde="x")
    for wrong in ({"batch_size": 0}, {"noise_on": "answer"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BLTHarness(str(directory / "hf"), **wrong)
    with pytest.raises(ValueError, match="a continuation has 130 bytes"):
        BLTHarness(str(directory / "hf"), max_length=120).loglikelihood(requests(("x", "y" * 130)), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks = 30, 120 bytes: leaves no room"):
        BLTHarness(str(directory / "hf"), max_length=120).generate_until(requests(("x", {"max_gen_toks": 30})))
    assert recomputed(blt(), b"a", RULES["space"], 3, GREEDY)
