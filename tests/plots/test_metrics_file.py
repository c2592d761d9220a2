"""A metrics file: which lines count, how long ones are thinned, and that only what is new is read again."""

import itertools
import json
import os
import tracemalloc

import pytest

from blt_titan.plots import metrics_file
from blt_titan.plots.metrics_file import MOST_LINE_BYTES, MOST_POINTS, Curve, RunMetrics, parse_line

GOOD = b'{"step": 7, "bits_per_byte": 2.5}\n'
BAD = {
    "text for a number": (b'{"step": 1, "bits_per_byte": "2.5"}', "\"bits_per_byte\" is '2.5', not a number"),
    "text for a step": (b'{"step": "1", "bits_per_byte": 2.5}', '"step" is '),
    "a step that is no whole number": (b'{"step": 1.5, "bits_per_byte": 2.5}', '"step" is 1.5'),
    "no step": (b'{"bits_per_byte": 2.5}', '"step" is None'),
    "a boolean": (b'{"step": 1, "heldout_bits_per_byte": true}', '"heldout_bits_per_byte" is True'),
    "a boolean for a step": (b'{"step": true, "bits_per_byte": 2.5}', '"step" is True'),
    "a list": (b'{"step": 1, "training_flops": [1]}', '"training_flops" is [1]'),
    "an object": (b'{"step": 1, "bits_per_byte": {"a": 1}}', '"bits_per_byte" is {'),
    "NaN": (b'{"step": 1, "bits_per_byte": NaN}', "NaN is not JSON"),
    "Infinity elsewhere": (b'{"step": 1, "grad_norm": Infinity}', "Infinity is not JSON"),
    "a number that becomes infinite": (b'{"step": 1, "bits_per_byte": 1e999}', '"bits_per_byte" is inf'),
    "400 digits": (b'{"step": 1, "bits_per_byte": ' + b"1" * 400 + b"}", '"bits_per_byte" is 1111'),
    "400 digits for a step": (b'{"step": ' + b"1" * 400 + b', "bits_per_byte": 2.5}', '"step" is 1111'),
    "5,000 digits": (b'{"step": 1, "bits_per_byte": ' + b"1" * 5000 + b"}", "integer string conversion"),
    "below zero": (b'{"step": 1, "bits_per_byte": -1}', '"bits_per_byte" is -1'),
    "a list for an object": (b"[1, 2]", "not one JSON object"),
    "two objects": (b'{"step": 1} {"step": 2}', "not one JSON object"),
    "NUL bytes": (b"\0" * 300, "not JSON"),
    "bytes that are not UTF-8": (b'{"step": 1, "note": "\xff"}', "not UTF-8"),
    "nested deeply": (b'{"step": 1, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a line without end": (b'{"step": 1, "a": "' + b"x" * 3 * MOST_LINE_BYTES + b'"}', "longer than 1,048,576 bytes"),
    "a line as long as a piece": (b"x" * (MOST_LINE_BYTES - 1), "not JSON"),
    "a torn line within": (b'{"step": 1, "bits_per', "not JSON"),
}


def read(path) -> RunMetrics:
    metrics = RunMetrics(path)
    metrics.update()
    return metrics


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_passed_over_and_counted(kind, tmp_path):
    line, reason = BAD[kind]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD.replace(b"7", b"8") + line + b"\n")
    metrics = read(path)
    assert metrics.training.points() == [(7, 2.5), (8, 2.5)]
    assert metrics.heldout.points() == []
    assert metrics.best is None
    assert metrics.skipped == 2
    assert metrics.note().startswith("2 of 4 lines passed over; the first, line 2: ")
    assert reason in metrics.note()
    assert len(metrics.note()) < 200


def test_what_is_missing_or_null_is_no_fault():
    for line in (b'{"step": 1}', b' {"step": 1, "bits_per_byte": null}\r\n', b'{"step": 0, "share/web": 1}'):
        assert parse_line(line)["step"] in (0, 1)


@pytest.mark.parametrize("ending", [b'{"step": 9, "bits_', b"\0" * 5000, b"x" * 2 * MOST_LINE_BYTES])
def test_a_last_line_that_is_cut_off_counts_until_it_is_whole(ending, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + ending)
    metrics = read(path)
    assert metrics.note().startswith("1 of 2 lines passed over; the first, line 2: cut off, or still being written")
    path.write_bytes(GOOD + b'{"step": 9, "bits_per_byte": 1}')
    metrics.update()
    assert metrics.note() == ""
    assert metrics.training.points() == [(7, 2.5), (9, 1.0)]


@pytest.mark.parametrize("n", [1, 2, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 4001, 150_000])
def test_a_curve_keeps_its_ends_and_even_distances(n):
    curve = Curve()
    for step in range(n):
        curve.add(step, step / 2)
    points = curve.points()
    assert points[0] == (0, 0)
    assert points[-1] == (n - 1, (n - 1) / 2)
    assert min(n, MOST_POINTS // 2) <= len(points) <= MOST_POINTS
    between = {b[0] - a[0] for a, b in itertools.pairwise(points[:-1])}
    assert len(between) <= 1
    assert Curve().points() == []


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(30_000):
            file.write(json.dumps({"step": step, "bits_per_byte": 2.0, "note": "x" * 1000}) + "\n")
        file.write("x" * 30_000_000 + "\n")
    tracemalloc.start()
    metrics = read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert metrics.skipped == 1
    assert peak_bytes < 6_000_000 < path.stat().st_size / 10


def test_only_what_was_appended_is_read_again(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(metrics_file, "parse_line", lambda line: parsed.append(line) or parse_line(line))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD * 1000 + b"bad\n")
    metrics = read(path)
    assert len(parsed) == 1001
    metrics.update()
    assert len(parsed) == 1001
    with path.open("ab") as file:
        file.write(b'{"step": 8, "heldout_bits_per_byte": 2, "training_flops": 1e9}\nbad\n{"st')
    metrics.update()
    assert len(parsed) == 1004
    assert metrics.best == {"flops": 1e9, "bits_per_byte": 2.0, "step": 8}
    assert metrics.note().startswith("3 of 1,004 lines passed over; the first, line 1,001: not JSON")


@pytest.mark.parametrize("how", ["shorter", "in place", "another file", "in place and longer"])
def test_another_file_is_read_anew(how, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD * 10)
    metrics = read(path)
    other = GOOD.replace(b"2.5", b"3.5") * {"shorter": 5, "in place and longer": 20}.get(how, 10)
    if how == "another file":
        (tmp_path / "new").write_bytes(other)
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(other)
        os.utime(path, ns=(0, 1))
    metrics.update()
    assert metrics.training.points() == [(7, 3.5)] * other.count(b"\n")
