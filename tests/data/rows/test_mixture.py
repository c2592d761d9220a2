"""Mixtures: shares of bytes, each data set in its own order, the same rows for any ranks and after any stop."""

from collections import Counter

import numpy as np
import pytest

from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.mixture import PERIOD, MixtureOrder, ShardSets, dataset_names, mixture_order
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardSet
from tests.helpers.small_loader import PATCHER, SHAPE, interleaved, merged, random_documents, rows_of, take, write

STREAMS = 24
WEIGHTS = [0.6, 0.3, 0.1]
LETTERS = [b"abcdefgh", b"ijklmnop", b"qrstuvwx"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> ShardSets:
    """Three data sets with letters of their own, of unlike sizes and record batches."""
    root = tmp_path_factory.mktemp("mixture")
    for number, letters in enumerate(LETTERS):
        table = bytes.maketrans(LETTERS[0], letters)
        documents = [text.translate(table) for seed in range(3 - number) for text in random_documents(seed)]
        write(root / str(number), documents)
    return ShardSets([ShardSet(root / str(number), "train") for number in range(3)])


def loader_of(sets: ShardSets, **changes) -> RowLoader:
    order = mixture_order(sets, WEIGHTS, streams=STREAMS, seed=0)
    return RowLoader(RowSource(sets, PATCHER, SHAPE), order, rows_per_batch=1, **changes)


def dataset_of_ids(rows: np.ndarray) -> np.ndarray:
    """Letters of each data set in ids."""
    return np.array([sum(int((rows == byte + 4).sum()) for byte in letters) for letters in LETTERS])


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.6, 0.3, 0.1), (0.9997, 0.0003), (0.31, 0.27, 0.2, 0.12, 0.1)])
@pytest.mark.parametrize("streams", [1, 24, 100])
def test_each_data_set_is_read_in_its_own_order_and_share(shares, streams):
    sizes = tuple(37 + 10 * d for d in range(len(shares)))
    order = MixtureOrder(sizes, shares, streams, seed=3)
    first = np.cumsum([0, *sizes])
    picked: list[list[int]] = [[] for _ in shares]
    counts = np.zeros(len(shares))
    for g in range(2 * PERIOD + 50):
        pick, stream = divmod(g, streams)
        dataset, i = order.dataset(stream, pick), order.record_batch(stream, pick)
        assert first[dataset] <= i < first[dataset + 1]
        assert order.epoch(stream, pick) == len(picked[dataset]) // sizes[dataset]
        picked[dataset].append(i)
        counts[dataset] += 1
        assert np.abs(counts - np.array(shares) * (g + 1)).max() <= 2 + g // PERIOD
    for dataset, of_it in enumerate(picked):
        for begin in range(0, len(of_it) - sizes[dataset], sizes[dataset]):
            assert len(set(of_it[begin : begin + sizes[dataset]])) == sizes[dataset], "an epoch has each once"


def test_the_worked_example():
    order = MixtureOrder((10, 10, 10), (1 / 2, 1 / 3, 1 / 6), 1, 0)
    assert "".join("abc"[order.dataset(0, pick)] for pick in range(9)) == "abacbaaba"


def test_no_stream_reads_one_data_set_alone():
    order = MixtureOrder((500, 500), (0.5, 0.5), 120, 0)
    for stream in range(120):
        assert 0.3 < np.mean([order.dataset(stream, pick) for pick in range(200)]) < 0.7


def test_shares_are_of_bytes(sets):
    loader = loader_of(sets)
    rows = np.concatenate([batch.ids_BS.numpy() for batch in take(loader, 1000)])
    letters = dataset_of_ids(rows)
    # Letters are the same part of the text in each data set.
    assert np.abs(letters / letters.sum() - WEIGHTS).max() < 0.01
    ids = loader.ids_by_dataset()
    assert ids.sum() == (rows != 0).sum(), "every id is counted"
    assert np.abs(ids / ids.sum() - WEIGHTS).max() < 0.01


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_goes_on_with_other_ranks(sets, num_workers):
    expected = rows_of(take(loader_of(sets), 144))
    state: dict = {}
    rows = []
    for dp_size, steps in ((2, 12), (6, 5), (3, 20)):
        loaders = [loader_of(sets, dp_rank=r, dp_size=dp_size, num_workers=num_workers) for r in range(dp_size)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        rows.append(interleaved([rows_of(take(loader, steps)) for loader in loaders]))
        state = merged([loader.state_dict() for loader in loaders])
        # What is counted of the data sets is of the run, not of its last part.
        counted = sum(loader.ids_by_dataset() for loader in loaders)
        whole = loader_of(sets)
        take(whole, state["rows_served"])
        np.testing.assert_array_equal(counted, whole.ids_by_dataset())
    got = np.concatenate([part.numpy() for part in rows])
    np.testing.assert_array_equal(got, expected[: len(got)].numpy())


def test_other_weights_cannot_continue_a_run(sets):
    state = loader_of(sets).state_dict()
    order = mixture_order(sets, [0.5, 0.3, 0.2], streams=STREAMS, seed=0)
    other = RowLoader(RowSource(sets, PATCHER, SHAPE), order, rows_per_batch=1)
    with pytest.raises(DataError, match=r"written with data\.mixture \(shares\) = "):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0, 1.0], "weights must be positive numbers, got 1.0, 0.0"),
        ([1.0, float("nan"), 1.0], "got 1.0, nan, 1.0"),
        ([1.0, 1.0, 1e-6], "the least is 0.0002"),
    ],
)
def test_weights_that_cannot_be_had_are_refused(sets, weights, message):
    with pytest.raises(DataError, match=message):
        mixture_order(sets, weights, streams=STREAMS, seed=0)


def test_sets_are_numbered_one_after_the_other(sets):
    texts = [batch.text.tobytes() for batch in sets]
    assert len(texts) == len(sets) == sum(len(shards) for shards in sets.sets)
    assert texts == [batch.text.tobytes() for shards in sets.sets for batch in shards]
    assert Counter(sets.record_batch_info(i).shard_path.parent.name for i in range(len(sets))) == {
        str(number): len(shards) for number, shards in enumerate(sets.sets)
    }
    assert ShardSets(sets.sets[:1]).fingerprint == sets.sets[0].fingerprint != sets.fingerprint
    with pytest.raises(IndexError):
        sets.read(len(sets))


def test_names_for_metrics():
    assert dataset_names(["data/web", "data/code"]) == ["web", "code"]
    assert dataset_names(["a/web", "b/web", "c/code"]) == ["a/web", "b/web", "code"]
