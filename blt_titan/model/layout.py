"""From patch lengths, as `transformers` takes them, to the indices of `batch.PatchLayout`.

For full rows, outside training: the checks wait for the device.
"""

import torch

from blt_titan.batch import PADDING, PatchLayout
from blt_titan.byte_vocab import EOS_ID


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
            negative length, a zero before a positive length, does not sum to S + 1, or has a patch that holds bytes
            after an EOS, which would let one document see another.
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
    if bool((patch_doc_BP.gather(1, patch_BS1[:, :S]) != byte_doc_BS).any()):
        raise ValueError("patch_lengths: a patch lies in two documents; a patch must end at each EOS")
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
            f"target; got first lengths {_numbers(lengths_BP[:, 0])}"
        )
    if bool((lengths_BP < 0).any()) or bool(((lengths_BP[:, :-1] == 0) & (lengths_BP[:, 1:] > 0)).any()):
        raise ValueError("patch_lengths must be positive, then zeros on the right as padding")
    sums_B = lengths_BP.sum(1)
    if bool((sums_B != S + 1).any()):
        raise ValueError(
            f"patch_lengths must sum to S + 1 = {S + 1} in every row (the last patch counts the target that is "
            f"not an input), got {_numbers(sums_B)}"
        )


def _numbers(tensor_B: torch.Tensor) -> str:
    return str(list(map(int, tensor_B)))
