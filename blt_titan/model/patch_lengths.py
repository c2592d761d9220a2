"""Patch lengths, as `transformers` takes them, checked and laid out.

For full rows, outside training: the lengths come to the host, and the indices go back.
"""

import numpy as np
import torch

from blt_titan.batch import PatchLayout
from blt_titan.byte_vocab import EOS_ID
from blt_titan.layout import lay_out


def layout_from_patch_lengths(ids_BS: torch.Tensor, patch_lengths_BP: torch.Tensor) -> PatchLayout:
    """Lay out rows that are full of real bytes, given the lengths of their patches.

    Args:
        ids_BS: ids, integer [B, S], no padding. A new document begins after each EOS.
        patch_lengths_BP: integer [B, P], each row `[1, ...]` with sum S + 1 (the last patch also counts the
            target that is not an input), right-padded with zeros.

    Returns:
        The layout, int64, on the ids' device; a patch slot without a byte among the inputs is padding.

    Raises:
        ValueError: if there is not one row of lengths per row of ids, or a row does not begin with 1, has a
            negative length, a zero before a positive length, does not sum to S + 1, or has a patch that holds bytes
            after an EOS, which would let one document see another.
    """
    lengths_BP = patch_lengths_BP.to(torch.int64)
    _check_patch_lengths(lengths_BP, ids_BS)
    S = ids_BS.shape[1]
    lengths_BP, is_eos_BS = lengths_BP.cpu().numpy(), (ids_BS == EOS_ID).cpu().numpy()
    # The target after the last byte is no input: it shortens the patch that holds it, or is a patch without bytes.
    end_BP = lengths_BP.cumsum(1)
    begin_BP = np.minimum(end_BP - lengths_BP, S)
    byte_len_BP = np.minimum(end_BP, S) - begin_BP
    byte_doc_BS = is_eos_BS.cumsum(1) - is_eos_BS
    patch_doc_BP = np.take_along_axis(byte_doc_BS, np.minimum(begin_BP, S - 1), axis=1)
    layout = lay_out(byte_len_BP, patch_doc_BP, S, last_is_open_B=(byte_len_BP > 0).sum(1) == (lengths_BP > 0).sum(1))
    if (layout.byte_doc_BS.numpy() != byte_doc_BS).any():
        raise ValueError("patch_lengths: a patch lies in two documents; a patch must end at each EOS")
    return layout.map(lambda tensor: tensor.to(ids_BS.device))


def _check_patch_lengths(lengths_BP: torch.Tensor, ids_BS: torch.Tensor) -> None:
    B, S = ids_BS.shape
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
