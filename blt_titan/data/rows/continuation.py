"""What a checkpoint says of the data that its run reads, and whether another run can go on in it.

A checkpoint holds a table of stream positions, how many rows were served, and as JSON what gives those positions their
meaning: the text and its order, which cannot change, and what decides where patches begin, which may. Its keys are
names in files: another wording of a message must not break a resume.
"""

from collections.abc import Mapping
from typing import Any

from blt_titan.data.rows.mixture import MixtureOrder
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.store.errors import DataError

IDENTITY_KEY = "dataloader.identity"
"""Where a checkpoint has what `data_identity` returns."""
ROWS_KEY = "dataloader.rows_served"
"""Where it has how many rows all ranks together have read."""

_PATCHING = "patching"
_SHOWN = {
    "data.fingerprint": "training.dataset_path (fingerprint)",
    "data.mixture.shares": "data.mixture (shares)",
    "entropies": "entropies (of the model)",
}
"""What messages call identifiers that are not keys of a TOML."""


def data_identity(fingerprint: str, order: StreamOrder | MixtureOrder, patching: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run reads; its checkpoints keep it, as JSON.

    Args:
        fingerprint: of the run's data.
        order: the run's streams.
        patching: what decides where its patches begin, as `patcher.patch_decisions` has it.
    """
    return {
        "data.streams": order.streams,
        "data.seed": order.seed,
        "data.fingerprint": fingerprint,
        **({"data.mixture.shares": list(order.shares)} if isinstance(order, MixtureOrder) else {}),
        _PATCHING: dict(patching),
    }


def check_continues(saved: Mapping[str, Any], own: Mapping[str, Any], *, patching_may_change: bool) -> list[str]:
    """Check that a run can go on in the data of a checkpoint.

    Args:
        saved: the identity of the checkpoint's data, as `data_identity` returns it.
        own: that of the run's.
        patching_may_change: go on with other patches.

    Returns:
        A sentence for each thing that is otherwise from here on.

    Raises:
        DataError: if the checkpoint belongs to other data, to another order or to other patches; names what differs.
    """
    for key in sorted(saved.keys() | own.keys()):
        if key != _PATCHING and saved.get(key) != own.get(key):
            raise DataError(
                "the checkpoint's data order cannot be continued: it was written with "
                f"{_SHOWN.get(key, key)} = {saved.get(key)!r}, this run has {own.get(key)!r}; set it as it was, or "
                "begin in another job.dump_folder"
            )
    changed, before = [], saved.get(_PATCHING, {})
    for key, value in own[_PATCHING].items():
        if before.get(key) == value:
            continue
        said = f"the checkpoint was written with {_SHOWN.get(key, key)} = {before.get(key)!r}, this run has {value!r}"
        if not patching_may_change and key in before:
            raise DataError(
                f"{said}, so patches would be cut otherwise: set it as it was, or set patching.allow_change = true"
            )
        changed.append(f"{said}: from here on patches are cut otherwise (no text is lost or repeated)")
    return changed
