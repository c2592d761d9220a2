"""Times, intervals and sentences of a plan, against the same by hand."""

import dataclasses
import math

import pytest

from blt_titan.dry_run.sent import Collective
from blt_titan.plan.compute_optimal import TextForSize
from blt_titan.plan.network import NETWORKS, Network
from blt_titan.plan.reliability import best_interval, goodput, mean_time_between_failures
from blt_titan.plan.time import Compute, step_time

NETWORK = Network(
    "x", node_gpus=8, in_node_bytes_per_s=100.0, between_nodes_bytes_per_s=10.0, share=0.5, latency_s=0.25
)


def collective(axis="fsdp", kind="all-gather", ranks=8, stride=1, in_micro_batch=True, calls=2, moved=1000.0):
    return Collective(kind, axis, ranks, stride, in_micro_batch, calls, moved)


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "rate"),
    [
        ("all-gather", 8, 1, 50),
        ("all-gather", 4, 2, 50),
        # Two of a node, and so two rings, each through an adapter.
        ("reduce-scatter", 16, 4, 10),
        ("all-reduce", 2, 8, 5),
        ("all-reduce", 2, 64, 5),
        # Eight rings, of 40 in all.
        ("all-gather", 16, 1, 40),
        # Each rank sends to each by its own adapter.
        ("all-to-all", 16, 1, 5),
        ("send", 16, 1, 5),
    ],
)
def test_a_collective_takes_the_slowest_link(kind, ranks, stride, rate):
    found = NETWORK.seconds(collective(kind=kind, ranks=ranks, stride=stride))
    assert found == pytest.approx(1000 / rate + 0.5)


def test_more_rings_are_no_faster_than_a_node():
    fast = dataclasses.replace(NETWORK, between_nodes_bytes_per_s=20.0)
    assert fast.seconds(collective(ranks=16)) == fast.seconds(collective(ranks=8))


def test_networks_are_named_by_what_they_are():
    assert all(name == network.name for name, network in NETWORKS.items())


def compute(**changes) -> Compute:
    return Compute(
        **{"flops": 600.0, "recomputed_flops": 0.0, "imbalance": 1.0, "bubble": 0.0, "micro_batches": 3} | changes
    )


def timed(work: Compute, *sent: Collective):
    return step_time(work, sent, NETWORK, flops_per_s=10.0, mfu=0.5)


def test_computing_alone():
    assert timed(compute()).seconds == 120.0
    assert timed(compute(recomputed_flops=60.0, imbalance=1.5)).compute_s == 660 * 1.5 / 5
    assert timed(compute(bubble=0.25)).seconds == 150.0


def test_weights_move_behind_computing():
    """20.5 s in each of three micro-batches, behind 120 s; of 200.5 s each, by one adapter, what is longer shows."""
    time = timed(compute(), collective())
    assert (time.seconds, time.hidden_network_s, time.exposed_network_s) == (120.0, pytest.approx(61.5), 0.0)
    time = timed(compute(), collective(ranks=64, stride=8))
    assert time.hidden_network_s == 120.0
    assert time.seconds == pytest.approx(3 * 200.5)


@pytest.mark.parametrize("change", [{"axis": "tp"}, {"axis": "cp"}, {"axis": "bytes", "kind": "all-to-all"}])
def test_what_a_layer_needs_is_waited_for(change):
    assert timed(compute(), collective(**change)).seconds == pytest.approx(120 + 3 * 20.5)


def test_what_a_step_ends_with_is_waited_for_once():
    assert timed(compute(), collective(in_micro_batch=False)).seconds == pytest.approx(140.5)


def test_a_failure_also_loses_what_was_done_while_a_save_was_stored():
    """Checked with a draw of each second of an interval: it loses that second and 60 s of work behind the save."""
    between, interval = 10_000.0, 600.0
    lost = sum(second + 60 for second in range(600)) / 600
    by_hand = (1 - lost / between) * interval / (interval + 1)
    assert goodput(interval, 1.0, 0.0, between, lost_behind_s=60.0) == pytest.approx(by_hand, abs=1e-4)


def test_the_interval_is_where_waste_is_least():
    between, save, restart = 36_000.0, 30.0, 300.0
    best = best_interval(save, between)
    kept = [goodput(best * factor, save, restart, between) for factor in (0.5, 0.9, 1.0, 1.1, 2.0)]
    assert max(kept) == kept[2]
    first_order = 1 - math.sqrt(2 * save / between) - restart / between
    # What the first order leaves out are products of two small shares.
    products = save / best * (save / best + (best / 2 + restart) / between)
    assert goodput(best, save, restart, between) == pytest.approx(first_order, abs=1.1 * products)


def test_nothing_fails_without_failures():
    assert mean_time_between_failures(8, 0.0) == math.inf
    assert goodput(100.0, 25.0, 300.0, math.inf) == 0.8
    assert mean_time_between_failures(1000, 0.001) == 3600.0


@pytest.mark.parametrize(
    ("text", "says"),
    [(6e12, "100 times what"), (60e9, "about what"), (6e9, "0.1 of what"), (3.77e12, "62.8 times what")],
)
def test_text_for_a_size(text, says):
    assert says in TextForSize(text, 10**9).sentence()
