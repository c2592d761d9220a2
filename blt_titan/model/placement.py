"""Where a model lives: what its forward does that depends on the devices that share rows and weights.

`parallelisms` makes one of these and hands it over once, before weights are drawn; the default is one device that holds
everything. The model itself knows no mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from blt_titan.batch import RowSplit
from blt_titan.model.attention import attend
from blt_titan.model.hash_embedding import LookUp, look_up_whole
from blt_titan.model.initialization import LocalColumns, WriteParameter, all_columns, write_whole
from blt_titan.model.layers import Attend

LastPatchBefore = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""State of the last patch before a slice, [B, 1, G]. It takes the states of the slice, [B, P, G], and the slot of its
own last patch, integer [B, 1], which the next slice receives."""


_WHOLE_ROWS = RowSplit()


@dataclass(frozen=True)
class Placement:
    """Which part of rows and weights this device holds, and how it gets what lies on others."""

    split: RowSplit = _WHOLE_ROWS
    """How the devices that share rows share the work on patches."""
    attend_bytes: Attend = attend
    """Attention of encoder and decoder: over slices, it brings keys and values of the bytes before them."""
    attend_patches: Attend = attend
    """Attention of the global blocks: over slices, it gathers keys and values of the row's patches."""
    last_patch_before: LastPatchBefore | None = None
    """Fetches the patch before a slice for the decoder; None where devices hold whole rows."""
    look_up: LookUp = look_up_whole
    """Sums rows of the hash tables, whose columns may lie on several devices."""
    write_parameter: WriteParameter = write_whole
    """Stores an initial weight, which was drawn whole."""
    local_columns: LocalColumns = all_columns
    """Which columns of a hash table lie on this device: only those are drawn."""
