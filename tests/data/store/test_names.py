"""Names that become part of a path."""

import pytest

from blt_titan.data.store.names import MOST_CHARACTERS, is_plain, plain_name


def test_plain_names_are_given_back():
    for name in ("default", "entropy_100m-v1.2", "0", "x" * MOST_CHARACTERS):
        assert plain_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../x", "/x", "a\\b", ".x", "-x", "a\0", "a\n", "é", "x" * 101, 3, None]
)
def test_what_leads_elsewhere_is_refused(name):
    assert not is_plain(name)
    with pytest.raises(ValueError, match="must be a plain name"):
        plain_name(name)
