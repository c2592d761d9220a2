"""The pages that are made by code are those that the code of today makes."""

from benchmarks import tables
from tests.helpers import worked_row


def test_the_worked_row_is_that_of_the_code():
    text = worked_row.PAGE.read_text()
    assert worked_row.with_worked_row(text) == text, "run python -m tests.helpers.worked_row --write"


def test_figures_are_those_of_the_results():
    for path, text in tables.pages().items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.tables"


def test_figures_follow_the_results():
    results = tables.read_results()
    results["start_up"]["shards"]["18000"]["open_s"] = 7.77
    for readme in (True, False):
        assert "7.77 s" in tables.section(results, readme=readme)
        assert "7.77 s" not in tables.section(tables.read_results(), readme=readme)
