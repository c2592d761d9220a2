"""The reference of settings is made from the dataclasses and rules, and the page in docs is as they are."""

from pathlib import Path

from blt_titan.config.help import settings_help
from blt_titan.config.reference import reference
from blt_titan.config.rules.keys import rules

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_is_generated():
    written = (ROOT / "docs/settings.md").read_text()
    assert written == reference(), "write it again: python -m blt_titan.config.reference > docs/settings.md"


def test_every_key_has_a_meaning_and_ours_are_on_the_page():
    settings, page = settings_help(), reference()
    assert {setting.key for setting in settings} == rules().keys()
    for setting in settings:
        if setting.is_ours:
            assert setting.meaning, setting.key
        if setting.is_ours or setting.rule.is_refused:
            assert f"| `{setting.key}` |" in page
