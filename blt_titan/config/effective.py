"""The settings that a run has in effect, as tables that make the same run when they are read again."""

from typing import Any

from blt_titan.config.read import CONFIG_FILE_KEY, settings_of
from blt_titan.config.run_config import RunConfig

_OF_ONE_START = (
    CONFIG_FILE_KEY,
    "checkpoint.load_step",
    "checkpoint.exclude_from_loading",
    "checkpoint.create_seed_checkpoint",
)


def effective_settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings as nested tables: what `blt-titan config` prints, and a run keeps in its folder.

    Left out are those that are not set, as TOML has no null, and those that are of one start and not of the run: from
    which step it goes back, say, would go back again at each resume.
    """
    table: dict[str, Any] = {}
    for key, value in settings_of(config).items():
        if value is None or key in _OF_ONE_START:
            continue
        *sections, name = key.split(".")
        section = table
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return table
