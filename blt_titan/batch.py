"""The batch contract: every index the model needs, as integers of fixed shape, batch first.

Letters: B rows, S byte slots in a row, P patch slots in a row. In a row the real bytes come first and padding
last, and likewise the patches, so that slots are real positions.

Worked example, one row of S = 9, P = 5 that holds the document `ab c` cut into patches of 1, 3 and 2 (`BOS`,
`ab `, `c EOS`), three byte slots and two patch slots of padding:

    token_ids_BS     BOS  a   b  ' '  c  EOS  .    .    .      (ids; padding is 0)
    labels_BS         a   b  ' '  c  EOS  -    -    -    -     (`-` is IGNORE_LABEL: EOS is predicted, BOS never is)
    byte_pos_BS       0   1   2   3   4   5    0    0    0
    byte_doc_BS       0   0   0   0   0   0   -1   -1   -1
    byte_patch_BS     0   1   1   1   2   2   -1   -1   -1     (patch that holds the byte)
    source_patch_BS   0   0   0   1   1   2   -1   -1   -1     (patch that the byte reads when it predicts its target)
    patch_pos_BP      0   1   2   0   0
    patch_doc_BP      0   0   0  -1  -1

The byte at i, whose target is the byte at i + 1, reads the patch just before the one that holds its target:
`source[i] = patch[i + 1] - 1`. A longer view would leak the target's own patch.
"""

from dataclasses import dataclass, fields

import torch

from blt_titan.byte_vocab import EOS_ID

IGNORE_LABEL = -100
"""Label of a slot without a target: padding, and EOS (whose successor would be the next document's BOS)."""

PADDING = -1
"""Document, patch and source index of a padding slot."""


@dataclass(frozen=True)
class PatchLayout:
    """Where bytes and patches of a row lie; what the model's forward takes beside the token ids."""

    byte_pos_BS: torch.Tensor
    """Real bytes before this one in the row, integer [B, S]; 0 where padded."""
    byte_doc_BS: torch.Tensor
    """Document of the byte, counted from 0 in each row, integer [B, S]; PADDING where padded."""
    byte_patch_BS: torch.Tensor
    """Slot of the patch that holds the byte, integer [B, S]; PADDING where padded."""
    source_patch_BS: torch.Tensor
    """Slot of the patch that the byte reads to predict its target, integer [B, S]; PADDING where padded."""
    patch_pos_BP: torch.Tensor
    """Real patches before this one in the row, integer [B, P]; 0 where padded."""
    patch_doc_BP: torch.Tensor
    """Document of the patch, integer [B, P]; PADDING where padded."""

    def as_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors by field name: the keyword arguments of the model's forward."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


LAYOUT_FIELDS = tuple(field.name for field in fields(PatchLayout))


def layout_from_patch_lengths(token_ids_BS: torch.Tensor, patch_lengths_BP: torch.Tensor) -> PatchLayout:
    """Lay out rows that are full of real bytes, given the lengths of their patches.

    Args:
        token_ids_BS: ids, integer [B, S], no padding. A new document begins after each EOS.
        patch_lengths_BP: integer [B, P], each row `[1, ...]` with sum S + 1 (the last patch also counts the
            target that is not an input), right-padded with zeros.

    Returns:
        The layout; a patch slot without a byte among the inputs is padding.

    Raises:
        ValueError: if there is not one row of lengths per row of ids, or a row does not begin with 1, has a
            negative length, a zero before a positive length, or does not sum to S + 1.
    """
    lengths_BP = patch_lengths_BP.to(torch.int64)
    _check_patch_lengths(lengths_BP, token_ids_BS)
    S, P = token_ids_BS.shape[1], lengths_BP.shape[1]
    device = token_ids_BS.device
    patch_end_BP = lengths_BP.cumsum(1)
    slots_S1 = torch.arange(S + 1, device=device).expand(lengths_BP.shape[0], S + 1).contiguous()
    patch_BS1 = torch.searchsorted(patch_end_BP, slots_S1, right=True)
    is_eos_BS = token_ids_BS == EOS_ID
    byte_doc_BS = is_eos_BS.long().cumsum(1) - is_eos_BS.long()
    patch_start_BP = patch_end_BP - lengths_BP
    has_bytes_BP = (lengths_BP > 0) & (patch_start_BP < S)
    patch_doc_BP = byte_doc_BS.gather(1, patch_start_BP.clamp(max=S - 1))
    return PatchLayout(
        byte_pos_BS=slots_S1[:, :S],
        byte_doc_BS=byte_doc_BS,
        byte_patch_BS=patch_BS1[:, :S],
        source_patch_BS=patch_BS1[:, 1:] - 1,
        patch_pos_BP=torch.arange(P, device=device).expand_as(lengths_BP) * has_bytes_BP,
        patch_doc_BP=torch.where(has_bytes_BP, patch_doc_BP, PADDING),
    )


def _check_patch_lengths(lengths_BP: torch.Tensor, token_ids_BS: torch.Tensor) -> None:
    B, S = token_ids_BS.shape
    if lengths_BP.ndim != 2 or lengths_BP.shape[0] != B or lengths_BP.shape[1] == 0:
        raise ValueError(
            f"patch_lengths must be [B, P], B = {B} rows as the ids and P >= 1, got shape {tuple(lengths_BP.shape)}"
        )
    if bool((lengths_BP[:, 0] != 1).any()):
        raise ValueError(
            "patch_lengths must begin with 1 in every row: a longer first patch would show the model its own "
            f"target; got first lengths {lengths_BP[:, 0].tolist()}"
        )
    if bool((lengths_BP < 0).any()) or bool(((lengths_BP[:, :-1] == 0) & (lengths_BP[:, 1:] > 0)).any()):
        raise ValueError("patch_lengths must be positive, then zeros on the right as padding")
    sums_B = lengths_BP.sum(1)
    if bool((sums_B != S + 1).any()):
        raise ValueError(
            f"patch_lengths must sum to S + 1 = {S + 1} in every row (the last patch counts the target that is "
            f"not an input), got {sums_B.tolist()}"
        )
