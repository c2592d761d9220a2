"""Times, intervals and sentences of a plan, against the same by hand."""

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
    ("ranks", "stride", "seconds"),
    [(8, 1, 1000 / 50 + 0.5), (4, 2, 1000 / 50 + 0.5), (2, 8, 1000 / 5 + 0.5), (16, 1, 1000 / 5 + 0.5)],
)
def test_a_collective_takes_the_slowest_link(ranks, stride, seconds):
    assert NETWORK.seconds(collective(ranks=ranks, stride=stride)) == pytest.approx(seconds)


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
    """20.5 s in each of three micro-batches, behind 120 s; of 200.5 s each, what is longer shows."""
    time = timed(compute(), collective())
    assert (time.seconds, time.hidden_network_s, time.exposed_network_s) == (120.0, pytest.approx(61.5), 0.0)
    time = timed(compute(), collective(ranks=64))
    assert time.hidden_network_s == 120.0
    assert time.seconds == pytest.approx(3 * 200.5)


@pytest.mark.parametrize("change", [{"axis": "tp"}, {"axis": "cp"}, {"axis": "bytes", "kind": "all-to-all"}])
def test_what_a_layer_needs_is_waited_for(change):
    assert timed(compute(), collective(**change)).seconds == pytest.approx(120 + 3 * 20.5)


def test_what_a_step_ends_with_is_waited_for_once():
    assert timed(compute(), collective(in_micro_batch=False)).seconds == pytest.approx(140.5)


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
