"""Entropies in lanes against the whole document alone: long, short, many, carried over chunks, reset at newlines."""

import weakref

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from blt_titan.byte_vocab import document_ids
from blt_titan.model import flex
from blt_titan.scoring.entropies import EntropyScorer, entropy_nats
from tests.helpers.small_entropy_model import ARGS, ENTROPY_ATOL, model_of, scored_alone


def documents(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [document_ids(bytes(rng.choice(np.frombuffer(b"abcd \n", np.uint8), size))) for size in sizes]


SIZES = {
    "short": [0, 1, 5, 30, 3, 0, 0, 12] * 6,
    "long": [700, 650],
    "one": [1000],
    "mixed": [3, 400, 0, 31, 32, 33, 900, 1, 64, 5],
}


@pytest.mark.parametrize("reset_at_newline", [False, True])
@pytest.mark.parametrize(("lanes", "chunk"), [(1, 16), (3, 32), (4, 100)])
@pytest.mark.parametrize("kind", SIZES)
def test_lanes_equal_one_document_at_a_time(kind, lanes, chunk, reset_at_newline):
    model = model_of(reset_at_newline=reset_at_newline)
    each = documents(SIZES[kind])
    expected = [scored_alone(model, ids) for ids in each]
    scorer = EntropyScorer(model, lanes=lanes, chunk=chunk)
    np.testing.assert_allclose(scorer.score(np.concatenate(each)), np.concatenate(expected), atol=ENTROPY_ATOL, rtol=0)
    # As many requests, which share lanes; and again, with nothing left over from before.
    for _ in range(2):
        got = dict(scorer.score_all(enumerate(each)))
        assert sorted(got) == list(range(len(each)))
        for number, entropies in got.items():
            np.testing.assert_allclose(entropies, expected[number], atol=ENTROPY_ATOL, rtol=0)


def test_the_context_reaches_over_chunks_and_no_further_than_the_window():
    model = model_of()
    [ids] = documents([200])
    changed = ids.copy()
    changed[100] = 99
    scorer = EntropyScorer(model, lanes=1, chunk=16)
    differs = np.flatnonzero(np.abs(scorer.score(ids) - scorer.score(changed)) > 1e-6)
    # Each layer looks W - 1 further back.
    assert differs.min() == 100
    assert 112 < differs.max() <= 100 + ARGS.n_layers * (ARGS.window - 1)


def test_a_newline_ends_what_is_seen():
    model = model_of(reset_at_newline=True)
    scorer = EntropyScorer(model, lanes=2, chunk=8)
    after = b"\nsame line"
    one, two = (scorer.score(document_ids(text + after))[-len(after) - 1 : -1] for text in (b"abc", b"something else"))
    np.testing.assert_allclose(one, two, atol=1e-5)
    free = EntropyScorer(model_of(), lanes=2, chunk=8)
    one, two = (free.score(document_ids(text + after))[-len(after) - 1 : -1] for text in (b"abc", b"something else"))
    assert np.abs(one - two).max() > 0.01


def test_little_is_padded():
    each = documents([500] * 200)
    scorer = EntropyScorer(model_of(), lanes=4, chunk=256)
    n_ids = sum(len(entropies) for _, entropies in scorer.score_all(enumerate(each)))
    assert n_ids == sum(map(len, each))
    assert scorer.slots_run <= 1.05 * n_ids


def shapes_of_forwards(scorer: EntropyScorer, n_documents: int) -> set[tuple[int, ...]]:
    """Score documents whose lanes run dry one by one, check the entropies, and return the shapes that were run."""
    shapes, forward = set(), scorer._forward
    all_carried = []

    def watched(ids_BC, real_BC, carried):
        shapes.add(tuple(ids_BC.shape))
        all_carried.append(weakref.ref(carried))
        return forward(ids_BC, real_BC, carried)

    scorer._forward = watched
    each = documents([40 * i for i in range(1, n_documents + 1)])
    expected = [scored_alone(model_of(), ids) for ids in each]
    for number, entropies in scorer.score_all(enumerate(each)):
        np.testing.assert_allclose(entropies, expected[number], atol=ENTROPY_ATOL, rtol=0)
    assert all_carried
    assert all(carried() is None for carried in all_carried), "nothing is held between calls"
    return shapes


def test_few_shapes_are_run_as_lanes_run_dry():
    shapes = shapes_of_forwards(EntropyScorer(model_of(), lanes=11, chunk=16), n_documents=29)
    assert (11, 16) in shapes
    assert shapes <= {(lanes, 16) for lanes in (11, 8, 4, 2, 1)}
    assert len(shapes) > 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_run_in_one_shape(monkeypatch):
    """Each further shape would be compiled anew, and a run has other uses for FlexAttention's few variants."""
    monkeypatch.setattr(flex, "_compiled_flex_attention", lambda: flex_attention)
    scorer = EntropyScorer(model_of(attention_backend="flex"), lanes=5, chunk=64)
    assert shapes_of_forwards(scorer, n_documents=9) == {(5, 64)}


def test_an_autocast_around_it_changes_nothing():
    scorer = EntropyScorer(model_of(), lanes=1, chunk=64)
    [ids] = documents([200])
    expected = scorer.score(ids)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(scorer.score(ids), expected)


def test_requests_are_read_as_lanes_run_dry():
    read = 0

    def requests():
        nonlocal read
        for number in range(100):
            read += 1
            yield number, documents([500])[0]

    scored = EntropyScorer(model_of(), lanes=2, chunk=64).score_all(requests())
    next(scored)
    assert read <= 4


@pytest.mark.parametrize("logits", [[[0.0, 0.0, 0.0, 0.0]], [[50.0, 0.0, 0.0, 0.0]]])
def test_entropy_by_its_definition(logits):
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(entropy_nats(torch.tensor(logits)), [-(p * np.log(p)).sum()], atol=1e-6)
