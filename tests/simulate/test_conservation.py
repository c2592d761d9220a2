"""All ranks of tiny worlds through a resume: the rows of one loader that never stops, and proofs that turn red."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from blt_titan.data.rows import order
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.streams import RowStream
from blt_titan.data.store.errors import DataError
from blt_titan.patching.rule import PatchRule
from blt_titan.simulate import simulate
from blt_titan.simulate.conservation import deal_streams, gather_streams, run_part
from blt_titan.simulate.data import TEMPLATES, Text, open_text
from blt_titan.simulate.ranks import World, deal, digest, gather, in_processes
from blt_titan.simulate.simulate import conserve

TEXT = Text(
    sets=(("data/x", 60_000),),
    weights=(),
    record_batch_bytes=700,
    streams=24,
    order_seed=3,
    rule=PatchRule("space", max_patch_bytes=16),
    shape=RowShape(segments=2, segment_bytes=64, segment_patches=40),
)
BEFORE, AFTER = World(16, 8, 2, 48), World(12, 6, 2, 36)
STEPS, RESUME_AT = 9, 4
UNEVEN = World(16, 8, 1, 40)
ENTROPIES = replace(TEXT, rule=PatchRule("global", threshold=1.0, max_patch_bytes=16))
MIXED = replace(TEXT, sets=(("data/x", 50_000), ("data/y", 30_000)), weights=(0.7, 0.3))


def conserved(text: Text = TEXT, workers: int = 1):
    return conserve(text, BEFORE, AFTER, STEPS, RESUME_AT, workers=workers)


def words(found) -> set[str]:
    return {sentence.split(":")[0] for sentence in found.faults}


@pytest.mark.parametrize("text", [TEXT, ENTROPIES, MIXED], ids=["text", "entropies", "mixture"])
def test_no_row_is_lost_or_repeated(text):
    found, state = conserved(text)
    assert found.faults == []
    assert found.rows == RESUME_AT * 48 + (STEPS - RESUME_AT) * 36
    assert found.amid_record_batches > 12, "most streams shall go on inside a record batch"
    assert found.more_than_once == 24
    assert state.file_bytes > 24 * 4 * 8


@pytest.mark.parametrize("resume_at", [4, 5])
def test_ranks_that_do_not_divide_the_rows_before_go_on(resume_at):
    assert resume_at * UNEVEN.global_batch % AFTER.dp_size
    found, _ = conserve(TEXT, UNEVEN, AFTER, STEPS, resume_at, workers=1)
    assert found.faults == []
    assert found.rows == resume_at * 40 + (STEPS - resume_at) * 36


def test_an_epoch_may_end():
    """The same text comes again; a row may then be filled alike."""
    small = replace(TEXT, sets=(("data/x", 17_000),))
    found, _ = conserve(small, BEFORE, AFTER, 40, 20, workers=1)
    read = gather_streams(found.rows, [run_part(part, lambda _: None) for part in deal_streams(small, found.rows, 1)])
    assert read.read[:, 2].max() >= 3
    assert found.faults == []


def rows_of_one_loader(text: Text, rows: int) -> tuple[list[int], dict]:
    data = open_text(text)
    loader = RowLoader(data.source, data.order, rows_per_batch=1)
    found = [digest(row) for [row] in itertools.islice(loader.packed_batches(), rows)]
    return found, loader.state_dict()


@pytest.mark.parametrize("text", [TEXT, MIXED], ids=["text", "mixture"])
def test_ranks_and_streams_make_the_rows_of_one_loader(text):
    expected, state = rows_of_one_loader(text, 5 * 48)
    served = gather([run_part(part, lambda _: None) for part in deal(text, BEFORE, 5, None, 1)])
    assert served.digests.tolist() == expected
    positions = served.state["positions"]
    np.testing.assert_array_equal(positions[:, :4], state["positions"][:, :4])
    read = gather_streams(240, [run_part(part, lambda _: None) for part in deal_streams(text, 240, 1)])
    assert read.digests.tolist() == expected


@pytest.mark.slow
def test_processes_change_nothing():
    parts = deal(TEXT, BEFORE, 3, None, 2)
    found = [
        gather(in_processes(run_part, parts, workers=workers, n_bytes=3 * 48 * 128, what="rows")) for workers in (1, 2)
    ]
    assert found[0].digests.tolist() == found[1].digests.tolist()
    np.testing.assert_array_equal(found[0].state["positions"], found[1].state["positions"])


def test_text_is_that_of_its_number():
    shards = open_text(MIXED).source.shards
    assert len(shards) > TEMPLATES
    texts = [shards.read(i).text.tobytes() for i in range(len(shards))]
    assert len(set(texts)) == len(texts)
    assert all(f"{i:010d}".encode() in text for i, text in enumerate(texts))
    assert sum(map(len, texts)) == shards.text_bytes
    assert sum(shards.record_batch_info(i).rows for i in range(len(shards))) == shards.documents
    patcher = open_text(MIXED).source.patcher
    for i in (0, 5, len(shards) - 1):  # as the run's own patcher cuts it
        batch = shards.read(i)
        real = simulate.open_text(TEXT).source.patcher._inner.patch(batch)  # pyright: ignore
        for made, cut in zip(patcher.patch(batch), real, strict=True):
            np.testing.assert_array_equal(made, cut)
    assert open_text(replace(MIXED, seed=1)).source.shards.fingerprint != shards.fingerprint


# What follows breaks the order or the state, each in another way, and the proof must see it.


def test_a_stream_that_forgets_its_place_in_a_record_batch_is_seen(monkeypatch):
    whole = RowStream.seek

    def seek(self, position):
        whole(self, np.concatenate([position[:1], [0], position[2:]]))

    monkeypatch.setattr(RowStream, "seek", seek)
    found, _ = conserved()
    assert words(found) >= {"order", "whole"}
    assert "rows of that run are missing" in found.faults[0]


def change_state(monkeypatch, change):
    saved = simulate.save

    def save(state, checkpoint):
        change(state["positions"])
        saved(state, checkpoint)

    monkeypatch.setattr(simulate, "save", save)


def test_a_stream_that_begins_anew_is_seen(monkeypatch):
    def forget(positions):
        positions[5] = 0

    change_state(monkeypatch, forget)
    found, _ = conserved()
    assert words(found) == {"order", "once", "whole"}
    assert "1 streams are not where their rows end, the first 5" in found.faults[-1]


def test_a_stream_that_passes_over_text_is_seen(monkeypatch):
    def skip(positions):
        positions[7, :2] = positions[7, 0] + 1, 0

    change_state(monkeypatch, skip)
    found, _ = conserved()
    assert words(found) == {"order", "whole"}


def test_ranks_that_change_places_are_seen(monkeypatch):
    """Each row comes once, in another order."""
    right = simulate.gather

    def gather(found, *first_row):
        return right([found[1], found[0], *found[2:]] if len(found) == 6 else found, *first_row)

    monkeypatch.setattr(simulate, "gather", gather)
    found, _ = conserved()
    assert words(found) >= {"order"}
    assert "0 rows of that run are missing, 0 are none of its rows" in found.faults[0]


def test_ranks_that_begin_as_if_they_divided_the_rows_before_are_seen(monkeypatch):
    def next_row(self):
        return self._rows_served // self.dp_size * self.dp_size + self.dp_rank

    monkeypatch.setattr(RowLoader, "_next_row", next_row)
    assert conserved()[0].faults == [], "where they divide them it is the same"
    found, _ = conserve(TEXT, UNEVEN, AFTER, STEPS, RESUME_AT, workers=1)
    assert words(found) >= {"order", "whole"}


def test_an_order_that_is_no_permutation_is_seen(monkeypatch):
    monkeypatch.setattr(order, "permute", lambda index, size, key: index // 2)
    found, _ = conserved()
    assert "dealt" in words(found)
    assert "order" not in words(found), "both sides read the wrong order"


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match=r"fewer than data\.streams = 24"):
        conserved(replace(TEXT, sets=(("data/x", 3_000),)))
