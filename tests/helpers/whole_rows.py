"""A packed row laid out as a whole, its fields by the names that the tests of packing and streams use."""

from types import SimpleNamespace

from blt_titan.batch import LAYOUT_FIELDS
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import Row, RowShape

FIELDS = ("token_ids", "labels", *(name[: name.rindex("_")] for name in LAYOUT_FIELDS))


def laid_out(row: Row, shape: RowShape) -> SimpleNamespace:
    batch = collate_rows([row], shape)
    arrays = [batch.ids_BS, batch.labels_BS, *batch.layout[: len(LAYOUT_FIELDS)]]
    fields = {name: array[0].numpy() for name, array in zip(FIELDS, arrays, strict=True)}
    return SimpleNamespace(**fields, n_ids=row.n_ids)
