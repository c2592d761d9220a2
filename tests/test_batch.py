"""The batch contract: its worked example is what the packer makes, and both ways to a layout agree."""

import re

import numpy as np
import pytest
import torch

from blt_titan import batch
from blt_titan.batch import IGNORE_LABEL, LAYOUT_FIELDS, PADDING
from blt_titan.byte_vocab import BOS_ID, BOUNDARY_ID, BYTE_OFFSET, EOS_ID, document_ids
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import PatchedIds, RowShape, pack_row
from blt_titan.model.patch_lengths import layout_from_patch_lengths
from blt_titan.patching import rule_patch_starts
from tests.helpers.layout_fields import fields_of

DOCUMENTS = [b"ab c", b"", b"one, two;  three", "π is not 3".encode(), b"x"]


def docstring_table() -> dict[str, list[int]]:
    """Read the worked example out of the module's docstring."""
    signs = {"BOS": BOS_ID, "EOS": EOS_ID, ".": BOUNDARY_ID, "-": IGNORE_LABEL, "' '": ord(" ") + BYTE_OFFSET}
    table = {}
    for name, cells in re.findall(r"^    (\w+_B[SP]) +(.*?)(?:  +\(.*)?$", batch.__doc__, flags=re.MULTILINE):
        values = re.findall(r"' '|\S+", cells)
        table[name] = [
            signs[value] if value in signs else ord(value) + BYTE_OFFSET if value.isalpha() else int(value)
            for value in values
        ]
    return table


def by_spaces(documents) -> PatchedIds:
    ids = np.concatenate([document_ids(document) for document in documents])
    return PatchedIds(ids, np.append(np.flatnonzero(rule_patch_starts(ids, rule="space")), len(ids)))


def test_worked_example_is_what_the_packer_makes():
    source = by_spaces([b"ab c"])
    assert np.diff(source.cuts).tolist() == [1, 3, 2]
    shape = RowShape(segments=1, segment_bytes=9, segment_patches=5)
    row = pack_row(source, shape)
    table = docstring_table()
    assert list(table) == ["ids_BS", "labels_BS", *LAYOUT_FIELDS]
    made = collate_rows([row], shape)
    for name, values in table.items():
        field = {"ids_BS": made.ids_BS, "labels_BS": made.labels_BS, **fields_of(made.layout)}[name]
        assert field[0].tolist() == values, name


def test_worked_example_without_its_padding_is_what_lengths_make():
    ids = torch.from_numpy(document_ids(b"ab c"))[None]
    layout = fields_of(layout_from_patch_lengths(ids, torch.tensor([[1, 3, 2, 1, 0]])))
    for name, values in docstring_table().items():
        if name in LAYOUT_FIELDS:
            assert layout[name][0].tolist() == values[: layout[name].shape[1]], name


@pytest.mark.parametrize("n_patches", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("first_patch", [0, 2, 6])
def test_full_rows_are_laid_out_alike_from_lengths_and_by_the_packer(n_patches, first_patch):
    """Rows of whole patches, from a document's beginning or from its middle; the next byte always starts a patch."""
    ids, cuts = by_spaces(DOCUMENTS)
    cuts = cuts[first_patch:] - cuts[first_patch]
    ids = ids[len(ids) - cuts[-1] :]
    if cuts[1] > 1:
        cuts = np.insert(cuts, 1, 1)
    n = int(cuts[n_patches])
    # One patch slot more than patches, for the patch that holds the last target only.
    shape = RowShape(segments=1, segment_bytes=n, segment_patches=n_patches + 1)
    made = collate_rows([pack_row(PatchedIds(ids, cuts), shape)], shape)
    lengths = np.append(np.diff(cuts[: n_patches + 1]), 1)
    ids_BS = torch.from_numpy(ids[:n])[None]
    layout = fields_of(layout_from_patch_lengths(ids_BS, torch.from_numpy(lengths)[None]))
    for name in LAYOUT_FIELDS:
        assert torch.equal(layout[name], getattr(made.layout, name).to(layout[name].dtype)), name
    assert torch.equal(ids_BS, made.ids_BS.to(ids_BS.dtype))


def test_rows_of_other_lengths_do_not_disturb_each_other():
    ids = torch.from_numpy(document_ids(b"abcdefgh"))[None].expand(3, 10)
    lengths = torch.tensor([[1, 10, 0, 0], [1, 1, 1, 8], [1, 9, 1, 0]])
    together = fields_of(layout_from_patch_lengths(ids, lengths))
    for row in range(3):
        alone = fields_of(layout_from_patch_lengths(ids[row : row + 1], lengths[row : row + 1]))
        for name in LAYOUT_FIELDS:
            assert torch.equal(together[name][row], alone[name][0]), name
    # The last patch of rows 0 and 1 counts the target too; in row 2 it holds nothing else, so it is padding.
    assert together["patch_doc_BP"].tolist() == [[0, 0, PADDING, PADDING], [0, 0, 0, 0], [0, 0, PADDING, PADDING]]


def test_source_is_the_patch_before_the_one_that_holds_the_target():
    ids, cuts = by_spaces(DOCUMENTS)
    lengths = np.append(np.diff(cuts), 1)
    layout = layout_from_patch_lengths(torch.from_numpy(ids)[None], torch.from_numpy(lengths)[None])
    holder = np.repeat(np.arange(len(lengths)), lengths)
    assert layout.source_patch_BS[0].tolist() == (holder[1:] - 1).tolist()
    assert layout.byte_patch_BS[0].tolist() == holder[:-1].tolist()
    # No byte reads another document's patch.
    document_of_source = layout.patch_doc_BP[0][layout.source_patch_BS[0]]
    assert torch.equal(document_of_source, layout.byte_doc_BS[0])


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([[2, 2, 1]], r"begin with 1 .* got first lengths \[2\]"),
        ([[0, 1, 4]], r"begin with 1 .* got first lengths \[0\]"),
        ([[1, 0, 4]], "be positive, then zeros on the right as padding"),
        ([[1, 5, -1]], "be positive, then zeros on the right as padding"),
        ([[1, 3]], r"sum to S \+ 1 = 5 .* got \[4\]"),
        ([1, 4], r"be \[B, P\], B = 1 .* got shape \(2,\)"),
        ([[]], r"be \[B, P\], B = 1 .* got shape \(1, 0\)"),
        ([[1, 4], [1, 4]], r"be \[B, P\], B = 1 .* got shape \(2, 2\)"),
    ],
)
def test_bad_lengths_say_what_is_wrong(lengths, said):
    with pytest.raises(ValueError, match=f"^patch_lengths must {said}$"):
        layout_from_patch_lengths(torch.full((1, 4), 70), torch.tensor(lengths))


def test_a_patch_in_two_documents_is_refused():
    ids = torch.tensor([[1, 70, 2, 1, 71, 2]])
    layout_from_patch_lengths(ids, torch.tensor([[1, 2, 1, 3]]))
    with pytest.raises(ValueError, match="two documents"):
        layout_from_patch_lengths(ids, torch.tensor([[1, 3, 3]]))
