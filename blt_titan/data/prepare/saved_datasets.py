"""Folders that `datasets` saved with `save_to_disk`: which files of them are data.

    saved/dataset_info.json state.json data-00000-of-00002.arrow ...   -> the data files that state.json names
    dict/dataset_dict.json train/ test/                                -> refused: name the splits to read

What else lies there, as the cache of a `map`, is no data.
"""

import json
from collections.abc import Callable, Collection
from typing import Any

from blt_titan.data.store.errors import DataError

MARKS = frozenset({"dataset_dict.json", "state.json"})
"""A folder without any of these files was not saved by `datasets`."""


def data_files(folder: str, names: Collection[str], read: Callable[[str], bytes]) -> list[str] | None:
    """Return the names in a saved data set that hold data, in order; None if the folder is no saved data set.

    Args:
        folder: for messages.
        names: what the folder holds.
        read: gives the content of a file in it.

    Raises:
        DataError: a data file is missing, the rows are chosen by an index, or there are several splits.
    """
    if "dataset_dict.json" in names:
        splits = _names(_content(read("dataset_dict.json")).get("splits"))
        if len(splits) > 1:
            raise DataError(
                f"{folder}: holds the splits {', '.join(splits)} of a saved DatasetDict; name those to read, as in "
                f"{folder}/{splits[0]}"
            )
        if splits:
            return [name for name in splits if name in names]
    if "dataset_info.json" not in names or "state.json" not in names:
        return None
    state = _content(read("state.json"))
    listed = state.get("_data_files")
    files = _names([file.get("filename") if isinstance(file, dict) else file for file in listed or []])
    if not isinstance(listed, list) or len(files) != len(listed):
        return None
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}/state.json: the saved data set chooses rows by an index, which is not read; save its "
            "flatten_indices() again"
        )
    for name in files:
        if name not in names:
            raise DataError(f"{folder}/state.json: names the data file {name}, which is not there; save the data again")
    return files


def _content(written: bytes) -> dict[str, Any]:
    try:
        content = json.loads(written)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _names(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
