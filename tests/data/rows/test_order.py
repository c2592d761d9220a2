from itertools import pairwise

import pytest

from blt_titan.data.rows.order import StreamOrder, permute

SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 100, 255, 257, 1025]


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_bijection_for_every_key(size):
    for key in [0, 1, 2, 3, 17, 2**32, 2**63 - 1, 2**64, 2**95 + 5]:
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_a_few_things_comes_up(size):
    seen = {tuple(permute(i, size, key) for i in range(size)) for key in range(2000)}
    assert len(seen) == {2: 2, 3: 6, 4: 24, 5: 120}[size]


def test_first_places_are_spread_over_all_record_batches():
    size, keys = 10, 2000
    counts = [0] * size
    for key in range(keys):
        counts[permute(0, size, key)] += 1
    # 200 expected, standard deviation 13; 5 of them.
    assert all(135 < count < 265 for count in counts)


def test_neighbours_do_not_stay_neighbours():
    places = [permute(i, 1000, key=5) for i in range(1000)]
    assert sum(abs(a - b) == 1 for a, b in pairwise(places)) < 15  # 2 expected


def epoch_of(order: StreamOrder, epoch: int) -> list[int]:
    """Return what the endless sequence holds in one epoch, in its order."""
    R, S = order.record_batches, order.streams
    return [order.record_batch(g % S, g // S) for g in range(epoch * R, (epoch + 1) * R)]


@pytest.mark.parametrize(("record_batches", "streams"), [(12, 4), (13, 4), (7, 7), (97, 6), (100, 1), (11, 10)])
def test_an_epoch_holds_every_record_batch_once(record_batches, streams):
    order = StreamOrder(record_batches, streams, seed=3)
    # By streams, as they are read: each one's picks that fall into the epoch.
    for epoch in range(3):
        read = [
            order.record_batch(stream, pick)
            for stream in range(streams)
            for pick in range(4 * record_batches // streams + 4)
            if order.epoch(stream, pick) == epoch
        ]
        assert sorted(read) == list(range(record_batches))
        assert sorted(epoch_of(order, epoch)) == list(range(record_batches))


def test_another_epoch_and_another_seed_are_another_order():
    orders = [epoch_of(StreamOrder(50, 5, seed), epoch) for seed in range(5) for epoch in range(5)]
    assert len(set(map(tuple, orders))) == len(orders)


@pytest.mark.parametrize("seed", [2**29, 2**31, 2**32, 2**62])
def test_no_bit_of_the_seed_is_lost(seed):
    assert epoch_of(StreamOrder(50, 5, seed), 0) != epoch_of(StreamOrder(50, 5, 0), 0)


def test_an_order_is_the_same_in_every_run():
    assert epoch_of(StreamOrder(9, 3, seed=1), 1) == [8, 4, 1, 6, 2, 5, 7, 0, 3], (
        "a changed order breaks the resumption of every checkpoint"
    )
