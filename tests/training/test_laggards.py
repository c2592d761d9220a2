"""Who holds up whom: the rank that others wait for and that waits for nobody."""

import mmap
import os
from dataclasses import replace

import pytest
import torch.distributed as dist

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.training.error_causes import is_of_a_collective
from blt_titan.training.heartbeat import Heartbeat, NeighbourHeartbeat, Pulse
from blt_titan.training.laggards import laggards, named, where_ranks_stand


def ranks_with(*collectives: dict[str, int], moves: tuple[int, ...] = ()) -> tuple[dict[int, Pulse], dict[int, Pulse]]:
    """Return what was known of ranks, and what is now: all have looked at themselves since."""
    before = {
        rank: Pulse(rank, "a", 1, collectives=counts, moves=moves[rank] if moves else 0)
        for rank, counts in enumerate(collectives)
    }
    return before, {rank: replace(pulse, beats=1) for rank, pulse in before.items()}


@pytest.mark.parametrize(
    ("collectives", "moves", "late"),
    [
        (({"x": 3}, {"x": 2}, {"x": 3}), (), [1]),
        (({"x": 3}, {"x": 2, "y": 1}, {"y": 2}), (), [1]),
        # Rank 1 is behind in x, but waits in y for rank 2, which is the cause.
        (({"x": 3}, {"x": 2, "y": 2}, {"y": 1}), (), [2]),
        (({"x": 3}, {"x": 3}), (), []),
        # Stages of a pipeline send to each other, which no group counts.
        (({"x": 3}, {"x": 3}, {"x": 3}), (7, 7, 6), [2]),
    ],
)
def test_the_one_who_waits_for_nobody_is_late(collectives, moves, late):
    assert laggards(*ranks_with(*collectives, moves=moves)) == late


def test_a_rank_that_looks_at_itself_no_more_is_late_wherever_it_stands():
    before, now = ranks_with({"x": 2}, {"x": 3})
    now[1] = before[1]
    assert laggards(before, now) == [1]
    before, now = ranks_with({"x": 2}, {"x": 3})
    assert laggards(before, now, gone=[1]) == [1]


def test_ranks_at_one_place_are_one_line():
    pulses = [Pulse(rank, f"h{rank // 8}", 1, step=7, phase="reduce", moves=9, since=10.0) for rank in range(48)]
    pulses[5] = replace(
        pulses[5], phase="data", moves=8, since=2.0, collectives={"x": 3}, last_collective="gloo:barrier"
    )
    first, second = where_ranks_stand(pulses, at=12.4)
    assert first == ("ranks 0-4, 6-47 (h0, h1, h2, h3 and 2 more): step 7, reduce, for 2 s; 0 collectives begun")
    assert second == "rank 5 (h0): step 7, data, for 10 s; 3 collectives begun, the last gloo:barrier"
    assert named([2]) == "rank 2"


def test_a_heartbeat_is_read_from_outside():
    heartbeat = Heartbeat()
    heartbeat.at("data", 7)
    pulse = Pulse(0, "a", os.getpid(), page=heartbeat.descriptor)
    outside = NeighbourHeartbeat(pulse)
    pulse.beats, pulse.idle_s = 3, 1.5
    heartbeat.write_seen(pulse)
    for _ in heartbeat.each([1, 2], "validate"):
        pass
    seen = outside.read()
    assert (seen.step, seen.phase, seen.beats, seen.idle_s) == (7, "validate", 3, 1.5)
    assert seen.moves == heartbeat.place.moves == 4
    # Half written: what was read before counts.
    page = mmap.mmap(heartbeat.descriptor, 0)
    page[80:90] = b"0123456789"
    assert outside.read().beats == 3


def test_what_a_checkpoint_could_not_be_written_for_may_be_a_collective():
    gloo = RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    error = CheckpointError("could not be written")
    error.__cause__ = gloo
    assert is_of_a_collective(error)
    assert is_of_a_collective(dist.DistStoreError("timed out"))
    assert not is_of_a_collective(RuntimeError("out of memory"))
