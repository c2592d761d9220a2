"""Heartbeats over the store of a run: small, bounded in number, and a slow store is no dead one."""

import json

import pytest
import torch.distributed as dist

from blt_titan.training import peers as peers_module
from blt_titan.training.heartbeat import Pulse
from blt_titan.training.peers import Peers

STACK = "  in forward\n" * 500


class Store:
    """A store in memory whose every answer takes seconds of a clock that the test holds."""

    def __init__(self, ranks: int = 0, answer_s: float = 0.0):
        self.said = {f"heartbeat/{rank}": Pulse(rank, "host", 1).to_json() for rank in range(ranks)}
        self.answer_s, self.now, self.read = answer_s, 0.0, 0
        self.at_answer = lambda: None

    def clone(self) -> "Store":
        return self

    def set_timeout(self, timeout) -> None:
        pass

    def set(self, key: str, value: bytes) -> None:
        self.said[key] = value

    def answer(self) -> None:
        self.now += self.answer_s
        self.at_answer()

    def check(self, keys: list[str]) -> bool:
        self.answer()
        return all(key in self.said for key in keys)

    def get(self, key: str) -> bytes:
        self.answer()
        return self.said[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.answer()
        self.read += len(keys)
        return [self.said[key] for key in keys]


@pytest.fixture
def peers_of(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    def make(store: Store, rank: int, world_size: int, beat_s: float) -> Peers:
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        monkeypatch.setattr(peers_module.time, "monotonic", lambda: store.now)
        return Peers(rank, world_size, beat_s)

    return make


def test_a_heartbeat_crosses_the_store_without_its_stack_which_is_there_to_be_asked_for(peers_of):
    store = Store()
    told = peers_of(store, 0, 2, 3.0)
    groups = {f"{'a' * 40}{group}/{1000 + group}": 10**6 + group for group in range(10)}
    pulse = Pulse(0, "h" * 64, 4_000_000, 10**6, "forward/backward", 10**7, 1.7e9 + 1 / 3, collectives=groups)
    pulse.stack, pulse.last_collective, pulse.limit_s = STACK, "nccl:_reduce_scatter_base", 90.0
    told.tell(pulse)
    told._exchange_once()
    assert len(store.said["heartbeat/0"]) < 1000
    assert json.loads(store.said["heartbeat/0"])["collectives"] == groups
    assert peers_of(store, 1, 2, 3.0).stack_of(0) == STACK
    assert peers_of(store, 1, 2, 3.0).stack_of(1) == ""
    # It goes on: what was told is no longer where it stands.
    told.tell(Pulse(0, "host", 1))
    told._exchange_once()
    assert peers_of(store, 1, 2, 3.0).stack_of(0) == ""


def test_a_store_that_takes_long_for_all_but_answers_each_is_not_silent(peers_of):
    store = Store(ranks=300, answer_s=1.0)
    peers = peers_of(store, 7, 300, 2.0)
    silent = []
    store.at_answer = lambda: silent.append(peers.store_silent_s)
    peers.tell(Pulse(7, "host", 1))
    peers.ask(all_ranks=True)
    for _ in range(2):
        began = store.now
        peers._exchange_once()
        assert store.now - began > 4, "a round is to take longer than the watch waits for an answer"
        assert max(silent) <= 3
    assert peers.rounds == 2
    assert peers.read().keys() == set(range(300))


def test_a_store_that_raises_is_silent(peers_of):
    store = Store(ranks=300)
    peers = peers_of(store, 7, 300, 2.0)
    peers.tell(Pulse(7, "host", 1))
    peers.ask(all_ranks=True)

    def fail() -> None:
        store.now += 4.0
        raise dist.DistStoreError("no answer")

    store.at_answer = fail
    for _ in range(3):
        with pytest.raises(RuntimeError):
            peers._exchange_once()
    assert peers.store_silent_s == 12.0
    assert peers.rounds == 0


@pytest.mark.parametrize(("world_size", "beats_of_a_round"), [(300, 1), (1024, 7)])
def test_what_all_ranks_ask_the_store_for_is_bounded(peers_of, world_size, beats_of_a_round):
    store = Store(ranks=world_size)
    peers = peers_of(store, 7, world_size, 3.0)
    peers.tell(Pulse(7, "host", 1))
    for _ in range(2):
        peers._exchange_once()
    assert (peers.rounds, store.read) == (0, 2), "rank 0 alone is asked for"
    peers.ask(all_ranks=True)
    store.read = 0
    for _ in range(beats_of_a_round):
        assert peers.rounds == 0
        peers._exchange_once()
    assert peers.rounds == 1
    assert peers.read().keys() == set(range(world_size))
    assert store.read * world_size / (beats_of_a_round * 3.0) < 55_000


def test_a_rank_that_has_not_begun_keeps_no_other_from_being_heard(peers_of):
    store = Store(ranks=5)
    del store.said["heartbeat/3"]
    peers = peers_of(store, 1, 5, 3.0)
    peers.tell(Pulse(1, "host", 1))
    peers.ask(all_ranks=True)
    peers._exchange_once()
    assert sorted(peers.read()) == [0, 1, 2, 4]
