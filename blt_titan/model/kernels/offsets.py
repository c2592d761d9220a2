"""Patches as runs of byte slots: from the patch of each byte to where runs begin, and back.

    patch of each byte    . 0 0 1 3 3 .       -1: none; only before the first and after the last byte with one
    first of 4 patches    1 3 4 4 6           run p is first[p] .. first[p + 1] - 1; patch 2 is empty

Letters: B rows, S byte slots, P patch slots.
"""

import torch


def first_of_patches(patch_BS: torch.Tensor, n_patches: int) -> torch.Tensor:
    """Find where the run of each patch begins.

    Args:
        patch_BS: the patch that a byte belongs to, or that it reads, integer [B, S], negative for none. Along a row it
            does not decrease, except that bytes without a patch may lie before the first and after the last with one.
        n_patches: P.

    Returns:
        The first slot of each patch, and beside them where the last ends, int32 [B, P + 1].

    >>> first_of_patches(torch.tensor([[-1, 0, 0, 1, 3, 3, -1]]), 4)
    tensor([[1, 3, 4, 4, 6]], dtype=torch.int32)
    """
    has_patch_BS = patch_BS >= 0
    slot_S = torch.arange(patch_BS.shape[1], device=patch_BS.device)
    # The first maximum: slot 0 where no byte of the row has a patch.
    is_after_BS = slot_S >= has_patch_BS.int().argmax(dim=1, keepdim=True)
    sorted_BS = torch.where(is_after_BS & ~has_patch_BS, n_patches, patch_BS)
    wanted_BP1 = torch.arange(n_patches + 1, device=patch_BS.device, dtype=sorted_BS.dtype)
    return torch.searchsorted(sorted_BS, wanted_BP1.expand(len(patch_BS), -1).contiguous(), out_int32=True)


def patch_of_bytes(first_BP1: torch.Tensor, byte_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the patch of each byte.

    Args:
        first_BP1: what `first_of_patches` returns.
        byte_slots: S.

    Returns:
        The patch that holds a byte, int64 [B, S], 0 for none; and whether one does, bool [B, S].

    >>> patch_of_bytes(torch.tensor([[1, 3, 4, 4, 6]]), 7)[0]
    tensor([[0, 0, 0, 1, 3, 3, 0]])
    """
    slot_BS = torch.arange(byte_slots, device=first_BP1.device, dtype=first_BP1.dtype).expand(len(first_BP1), -1)
    # Runs that begin at or before the slot; of several that begin there all but the last are empty.
    patch_BS = torch.searchsorted(first_BP1, slot_BS.contiguous(), right=True) - 1
    is_held_BS = (patch_BS >= 0) & (patch_BS < first_BP1.shape[1] - 1)
    return patch_BS * is_held_BS, is_held_BS
