"""What is an alert in made-up lines, and what is not."""

import random

from blt_titan.job_config import Monitor
from blt_titan.monitor.watch import FEWEST, LOW_LINES, RANK_LINES, Alert, Line, RankFigures, RunWatch


def line(step: int, **changes) -> Line:
    figures = {"seconds": 1.0, "saving_s": 0.0, "saves": 0, "n_bytes": 1e6, "grad_norm": 1.0}
    figures["ranks"] = [RankFigures(0.01, 0.01)]
    return Line(step, **figures | changes)


def alerts_of(lines: list[Line], *, hosts: int = 1, stages: int = 1, **settings) -> dict[int, list[Alert]]:
    """Alerts by step, those steps that had any."""
    watch = RunWatch(Monitor(**settings), hosts=[f"node{n}" for n in range(hosts)], stages=stages)
    found = {one.step: watch.look(one)[1] for one in lines}
    return {step: alerts for step, alerts in found.items() if alerts}


def ranks(*forward_s: float) -> list[RankFigures]:
    return [RankFigures(s, 0.0) for s in forward_s]


def test_a_slow_rank_of_two_is_named():
    found = alerts_of([line(n, ranks=ranks(0.010, 0.014)) for n in range(1, RANK_LINES + 2)], hosts=2)
    assert list(found) == [RANK_LINES + 1], "the first line warms up, then so many are looked at"
    [alert] = found[RANK_LINES + 1]
    assert (alert.kind, alert.subject) == ("slow rank", "1")
    assert alert.sentence == (
        "rank 1 on node1 is slow: its forward takes 14.0 ms, 1.40 times the 10.0 ms of others, who wait for it"
    )


def test_a_rank_that_is_slow_once_or_by_less_is_not_slow():
    draw = random.Random(0)
    noisy = [
        line(
            n,
            ranks=ranks(*(0.01 * draw.uniform(0.9, 1.1) * (3 if n % 5 == 0 and rank == 2 else 1) for rank in range(4))),
        )
        for n in range(100)
    ]
    assert alerts_of(noisy, hosts=4) == {}
    assert alerts_of([line(n, ranks=ranks(0.010, 0.0129)) for n in range(50)], hosts=2) == {}
    assert alerts_of([line(n, ranks=ranks(0.010, 0.1)) for n in range(50)], hosts=2, slow_rank=0.0) == {}


def test_ranks_are_compared_within_their_stage():
    uneven = [line(n, ranks=ranks(0.01, 0.01, 0.05, 0.05)) for n in range(20)]
    assert alerts_of(uneven, hosts=4, stages=2) == {}
    assert alerts_of(uneven, hosts=4, stages=4) == {}
    assert alerts_of(uneven, hosts=4)
    slow = [line(n, ranks=ranks(0.01, 0.02, 0.05, 0.05)) for n in range(20)]
    assert {alert.subject for alerts in alerts_of(slow, hosts=4, stages=2).values() for alert in alerts} == {"1"}


def test_a_drop_of_throughput_is_seen_and_noise_is_not():
    draw = random.Random(0)
    rates = [1e6 * draw.uniform(0.8, 1.2) for _ in range(60)]
    rates[20] = rates[40] = rates[41] = 1e5  # a pause, which is over
    steady = [line(n, n_bytes=rate) for n, rate in enumerate(rates)]
    assert alerts_of(steady) == {}
    low = [line(60 + n, n_bytes=6e5 * draw.uniform(0.95, 1.05)) for n in range(10)]
    found = alerts_of([*steady, *low])
    assert next(iter(found)) == 60 + LOW_LINES - 1
    assert found[62][0].kind == "throughput"
    assert alerts_of([*steady, *low], throughput_drop=0.0) == {}


def test_time_of_saves_and_of_the_first_line_is_no_drop():
    compiling = line(0, seconds=100.0)
    steady = [line(n) for n in range(1, 20)]
    saving = [line(n, seconds=5.0, saving_s=4.0, saves=1) for n in range(20, 30)]
    assert alerts_of([compiling, *steady, *saving], saving=0.0) == {}
    figures, _ = RunWatch(Monitor(), hosts=["a"]).look(saving[0])
    assert figures == {"saving_share": 0.8}


def test_a_spike_of_the_gradient_is_said_at_once():
    norms = [1.0 + 0.5 * (n % 3) for n in range(FEWEST + 5)]
    assert alerts_of([line(n, grad_norm=g) for n, g in enumerate(norms)]) == {}
    spiked = [*norms, 1.5 * 5.1, 1.0, float("nan"), 1.0]
    found = alerts_of([line(n, grad_norm=g) for n, g in enumerate(spiked)])
    assert list(found) == [len(norms)]
    assert found[len(norms)][0].sentence.startswith("the gradient norm is 7.65, 5.1 times the usual 1.5: ")
    assert alerts_of([line(n, grad_norm=g) for n, g in enumerate(spiked)], gradient_spike=0.0) == {}
    assert alerts_of([line(1, grad_norm=1.0), line(2, grad_norm=100.0)]) == {}, "a run that begins has no usual yet"


def test_much_time_for_saves_is_said_with_what_one_takes():
    rare = [line(n, saving_s=1.0 if n % 20 == 10 else 0.0, saves=int(n % 20 == 10)) for n in range(100)]
    assert alerts_of(rare) == {}
    often = [line(n, saving_s=0.4 if n % 2 else 0.0, saves=n % 2) for n in range(10)]
    [alert] = alerts_of(often)[9]
    assert alert.sentence.startswith(
        "saving has taken 20% of the time since the start, 0.4 s each: raise checkpoint.in"
    )


def test_what_a_save_takes_is_by_saves_and_not_by_lines():
    several_a_line = [line(n, saving_s=0.6, saves=3) for n in range(3)]
    [alert] = alerts_of(several_a_line)[2]
    assert "60% of the time since the start, 0.2 s each" in alert.sentence
    # A save beside the training is begun in one line, and waited for in another.
    beside = [line(n, saving_s=0.3, saves=int(n % 2 == 0)) for n in range(4)]
    found = alerts_of(beside)
    assert list(found) == [2, 3], "one save says nothing of how often there will be one"
    assert "30% of the time since the start, 0.6 s each" in found[3][0].sentence


def test_a_rank_that_waits_for_rows_is_named_with_the_others():
    waits = [line(n, ranks=[RankFigures(0.01, 0.02), RankFigures(0.01, 0.4)]) for n in range(RANK_LINES + 1)]
    [alert] = alerts_of(waits, hosts=2)[RANK_LINES]
    assert (alert.kind, alert.subject) == ("data", "1")
    assert alert.sentence.startswith("rank 1 on node1 waits for its rows for 40% of the time (others: 2%): ")
    alone = [line(n, ranks=[RankFigures(0.01, 0.4)]) for n in range(RANK_LINES + 1)]
    assert "(others" not in alerts_of(alone)[RANK_LINES][0].sentence
    assert alerts_of(waits, hosts=2, data_wait=0.0) == {}


def test_memory_beyond_its_prediction_is_said_of_the_rank_that_has_most():
    measured = [line(1, ranks=[RankFigures(0.01, 0.0, 50.0), RankFigures(0.01, 0.0, 60.0)])]
    [alert] = alerts_of(measured, hosts=2, predicted_memory_gib=50.0)[1]
    assert alert.sentence == (
        "rank 1 on node1 had 60.0 GiB of tensors at its peak, 1.20 times the monitor.predicted_memory_gib = 50"
    )
    assert alerts_of(measured, hosts=2, predicted_memory_gib=55.0) == {}
    assert alerts_of(measured, hosts=2) == {}


def test_figures_say_who_is_slowest():
    watch = RunWatch(Monitor(), hosts=["a", "b"])
    for n in range(RANK_LINES + 1):
        figures, _ = watch.look(line(n, ranks=[RankFigures(0.02, 0.1), RankFigures(0.01, 0.0)]))
    assert figures == {
        **{"slowest_rank": 0, "slowest_rank_ratio": 2.0},
        **{"slowest_data_rank": 0, "slowest_data_wait_share": 0.1},
    }
