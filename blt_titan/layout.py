"""From the lengths of patches to the indices of `batch.PatchLayout`: the one place that lays out rows.

The loader's rows, `transformers`' patch lengths and documents of inference all come here. A row enters as its patches,
in their slots: the bytes that each holds, and its document. That is all there is to know, since a patch lies in one
document; everything else is counting.

The ranks that share a row split its patch slots evenly, and each lays out the bytes of its own: with C context slices,
slice c holds the c-th C-th of the slots. Worked example: S = 12, P = 6, patches of 1 3 | 4 2 bytes, as one slice and as
two (`.` is padding, `<` the last patch before the slice, whose index is the number of a slice's patch slots):

                    one slice                         slice 0 of 2       slice 1 of 2
    patch_len       1 3 4 2 . .                       1 3 . 4 2 .  (of the whole row, slice beside slice)
    byte_patch      0 1 1 1 2 2 2 2 3 3 . .           0 1 1 1 . .        0 0 0 0 1 1
    source_patch    0 0 0 1 1 1 1 2 2 3 . .           0 0 0 1 . .        < < < 0 0 1
    byte_pos        0 1 2 3 4 5 6 7 8 9 . .           0 1 2 3 . .        4 5 6 7 8 9
    patch_pos       0 1 2 3 . .                       0 1 . 2 3 .  (of the whole row, slice beside slice)
"""

import numpy as np
import torch

from blt_titan.batch import PADDING, WHOLE_ROW, ContextSlice, PatchLayout


def lay_out(
    patch_len_BP: np.ndarray,
    patch_doc_BP: np.ndarray,
    byte_slots: int,
    *,
    context_slice: ContextSlice = WHOLE_ROW,
    last_is_open_B: np.ndarray | None = None,
) -> PatchLayout:
    """Lay out rows, or one context slice of each, on the host.

    Args:
        patch_len_BP: bytes of each patch among the inputs, integer [B, P]. In each slice's P / C slots the patches
            come first, and 0 stands in the slots that have none.
        patch_doc_BP: documents of the patches, of the same type; what stands in slots without a patch is not read.
        byte_slots: S of the slice, at least the bytes of its patches.
        context_slice: the slice whose bytes are laid out; the patch fields are of the whole row.
        last_is_open_B: whether the row's last patch also holds the target after its last byte, bool [B]. None where
            that target begins a patch in every row. Only for whole rows.

    Returns:
        The layout without `PatchLayout.slice`, in the type of `patch_len_BP`. Where the first patch of a whole row has
        more than one byte, some source is PADDING though the byte is real: there is no patch that it may read.

    >>> lay_out(np.array([[1, 3, 2, 0]]), np.array([[0, 0, 1, 0]]), 8).source_patch_BS
    tensor([[ 0,  0,  0,  1,  1,  2, -1, -1]])
    """
    (B, P), S, dtype = patch_len_BP.shape, byte_slots, patch_len_BP.dtype
    assert not P % context_slice.count
    slots = P // context_slice.count
    begin, end = context_slice.index * slots, (context_slice.index + 1) * slots
    has_bytes_BP = patch_len_BP > 0
    n_bytes_B = patch_len_BP[:, begin:end].sum(1)

    # The S slots in runs: one of each patch, and one of the padding.
    run_len_BR = np.empty((B, slots + 1), np.int64)
    run_len_BR[:, :slots], run_len_BR[:, slots] = patch_len_BP[:, begin:end], S - n_bytes_B
    value_BR = np.full((B, slots + 1), PADDING, dtype)

    def of_runs() -> np.ndarray:
        return np.repeat(value_BR.ravel(), run_len_BR.ravel()).reshape(B, S)

    value_BR[:, :slots] = patch_doc_BP[:, begin:end]
    byte_doc_BS = of_runs()
    value_BR[:, :slots] = np.arange(slots)
    byte_patch_BS = of_runs()

    # source[i] = patch[i + 1] - 1, and PADDING stays PADDING.
    source_patch_BS = np.full((B, S), PADDING, dtype)
    np.subtract(byte_patch_BS[:, 1:], 1, out=source_patch_BS[:, :-1])
    np.maximum(source_patch_BS, PADDING, out=source_patch_BS)
    # After the last byte of a row, or of a slice, a patch begins, if the last one is not open.
    real_B = np.flatnonzero(n_bytes_B)
    of_last_B = has_bytes_BP[:, begin:end].sum(1) - 1 - (0 if last_is_open_B is None else last_is_open_B)
    source_patch_BS[real_B, n_bytes_B[real_B] - 1] = of_last_B[real_B]
    if context_slice.index:
        source_patch_BS[(source_patch_BS == PADDING) & (byte_doc_BS != PADDING)] = slots

    pos_S = np.arange(S, dtype=dtype)
    byte_pos_BS = pos_S + patch_len_BP[:, :begin].sum(1, dtype=dtype, keepdims=True)
    byte_pos_BS *= pos_S < n_bytes_B[:, None]
    patch_pos_BP = has_bytes_BP.cumsum(1, dtype=dtype)
    patch_pos_BP -= 1
    patch_pos_BP *= has_bytes_BP
    patch_doc_BP = np.where(has_bytes_BP, patch_doc_BP, dtype.type(PADDING))
    return PatchLayout(
        byte_pos_BS=torch.from_numpy(byte_pos_BS),
        byte_doc_BS=torch.from_numpy(byte_doc_BS),
        byte_patch_BS=torch.from_numpy(byte_patch_BS),
        source_patch_BS=torch.from_numpy(source_patch_BS),
        patch_pos_BP=torch.from_numpy(patch_pos_BP),
        patch_doc_BP=torch.from_numpy(patch_doc_BP),
    )


def layout_without_patches(byte_doc_BS: torch.Tensor) -> PatchLayout:
    """Lay out rows for a model that knows no patches: rows of no patch slots, whose bytes are in none.

    Args:
        byte_doc_BS: document of each byte, integer [B, S], PADDING where padded.

    Returns:
        The layout, on the device and in the type of `byte_doc_BS`.
    """
    real_BS = byte_doc_BS != PADDING
    no_patch_BS, no_slots_B0 = torch.full_like(byte_doc_BS, PADDING), byte_doc_BS[:, :0]
    pos_S = torch.arange(byte_doc_BS.shape[1], dtype=byte_doc_BS.dtype, device=byte_doc_BS.device)
    return PatchLayout(pos_S * real_BS, byte_doc_BS, no_patch_BS, no_patch_BS, no_slots_B0, no_slots_B0)
