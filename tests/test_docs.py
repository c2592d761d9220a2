"""The pages that are made by code are those that the code of today makes."""

from tests.helpers import worked_row


def test_the_worked_row_is_that_of_the_code():
    text = worked_row.PAGE.read_text()
    assert worked_row.with_worked_row(text) == text, "run python -m tests.helpers.worked_row --write"
