"""Batches reach the device one ahead of the one that computes, page-locked and on a stream of their own."""

from contextlib import contextmanager

import pytest
import torch

from blt_titan.batch import Batch, PatchLayout, to_device
from blt_titan.data.rows import copies
from blt_titan.data.rows.copies import copied_ahead


def batch_of(number: int) -> Batch:
    return Batch(torch.full((1, 4), number), PatchLayout(*[torch.zeros(1, 4)] * 6), torch.zeros(1, 4))


def number_of(batch: Batch) -> int:
    return int(batch.ids_BS[0, 0])


@pytest.fixture
def happened(monkeypatch) -> list[str]:
    """What was fetched and copied so far; copies stay where they are, so that a GPU is not needed."""
    events: list[str] = []
    monkeypatch.setattr(Batch, "to", lambda batch, device: events.append(f"copy {number_of(batch)}") or batch)
    return events


def fetched(count: int, events: list[str]):
    for number in range(count):
        events.append(f"fetch {number}")
        yield batch_of(number)


def compute_all(count: int, events: list[str], device: str) -> None:
    for number, batch in enumerate(copied_ahead(fetched(count, events), device)):
        assert number_of(batch) == number
        events.append(f"compute {number}")


ONE_AHEAD = [
    *("fetch 0", "copy 0", "fetch 1", "copy 1", "compute 0", "fetch 2", "copy 2", "compute 1"),
    *("fetch 3", "copy 3", "compute 2", "compute 3"),
]


def test_one_batch_is_copied_ahead_and_no_more(happened):
    compute_all(4, happened, "cpu")
    assert happened == ONE_AHEAD


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_steps_are_whole(count, happened):
    compute_all(count, happened, "cpu")
    assert [event for event in happened if "compute" in event] == [f"compute {number}" for number in range(count)]


class Stream:
    """A stream of CUDA's that writes down what is asked of it."""

    def __init__(self, name: str, events: list[str]):
        self.name, self.events, self.marks, self.device = name, events, 0, torch.device("cuda", 0)

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.marks += 1
        return f"{self.name}'s mark {self.marks - 1}"

    def wait_event(self, event: str) -> None:
        self.events.append(f"{self.name} waits for {event}")


def test_on_cuda_copies_have_a_stream_that_computing_waits_for(happened, monkeypatch):
    """Each copy is begun on the other stream, after what computes before, and computing waits for its own copy only."""
    side, computing = Stream("side", happened), Stream("computing", happened)
    current = [computing]

    @contextmanager
    def within(stream):
        current.append(stream)
        yield
        assert current.pop() is stream

    monkeypatch.setattr(copies, "_copy_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(
        Batch, "to", lambda batch, device: happened.append(f"{current[-1].name} copies {number_of(batch)}") or batch
    )
    compute_all(3, happened, "cuda")
    assert [event for event in happened if "fetch" not in event] == [
        *("side waits for computing", "side copies 0"),
        *("side waits for computing", "side copies 1", "computing waits for side's mark 0", "compute 0"),
        *("side waits for computing", "side copies 2", "computing waits for side's mark 1", "compute 1"),
        *("computing waits for side's mark 2", "compute 2"),
    ]


def test_what_goes_to_cuda_is_page_locked_and_not_waited_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pin") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking=False: asked.append((device, non_blocking)) or tensor
    )
    batch_of(0).to("cuda")
    assert asked == ["pin", ("cuda", True)] * 8
    asked.clear()
    to_device(torch.zeros(1), "cpu")
    assert asked == [("cpu", True)], "the CPU has nothing to lock"
