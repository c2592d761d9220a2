"""The batch contract: every index the model needs, as integers of fixed shape, batch first.

Letters: B rows, S byte slots in a row, P patch slots in a row. In a row the real bytes come first and padding
last, and likewise the patches, so that slots are real positions.

Worked example, one row of S = 9, P = 5 that holds the document `ab c` cut into patches of 1, 3 and 2 (`BOS`,
`ab `, `c EOS`), three byte slots and two patch slots of padding:

    ids_BS           BOS  a   b  ' '  c  EOS  .    .    .      (ids; padding is 0)
    labels_BS         a   b  ' '  c  EOS  -    -    -    -     (`-` is IGNORE_LABEL: EOS is predicted, BOS never is)
    byte_pos_BS       0   1   2   3   4   5    0    0    0
    byte_doc_BS       0   0   0   0   0   0   -1   -1   -1
    byte_patch_BS     0   1   1   1   2   2   -1   -1   -1     (patch that holds the byte)
    source_patch_BS   0   0   0   1   1   2   -1   -1   -1     (patch that the byte reads when it predicts its target)
    patch_pos_BP      0   1   2   0   0
    patch_doc_BP      0   0   0  -1  -1

The byte at i, whose target is the byte at i + 1, reads the patch just before the one that holds its target:
`source[i] = patch[i + 1] - 1`. `layout.lay_out` computes it for all. A longer view would leak the target's own patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

IGNORE_LABEL = -100
"""Label of a slot without a target: padding, and EOS (whose successor would be the next document's BOS)."""

PADDING = -1
"""Document, patch and source index of a padding slot."""


class SliceLayout(NamedTuple):
    """What a slice of a row needs of the slices before it; `PatchLayout.slice` where rows are split.

    C slices of a row lie on C devices. The byte fields of `PatchLayout` are then those of the slice, its patch slots
    those of the whole row, slice beside slice, and a source of P / C is the last patch before the slice. Bytes are
    exchanged as each slice's last T = min(W - 1, S), which go to the next `ContextSlice.halo_slices` slices.
    """

    before_ids_BR: torch.Tensor
    """Ids of the R bytes before the slice, right-aligned, integer [B, R]; 0 before the row."""
    before_doc_BR: torch.Tensor
    """Documents of those bytes, integer [B, R]; PADDING before the row."""
    tail_BT: torch.Tensor
    """Slots of the slice's last T bytes, right-aligned, integer [B, T]; PADDING where it has fewer."""
    halo_BW: torch.Tensor
    """Where the W - 1 bytes before the slice are in what arrives, tail after tail, integer [B, W - 1]; PADDING before
    the row."""
    last_patch_B1: torch.Tensor
    """Slot of the slice's last patch, integer [B, 1]; 0 if it has none."""


SLICE_FIELDS = SliceLayout._fields


class PatchLayout(NamedTuple):
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

    slice: SliceLayout | tuple[()] = ()
    """What a slice of a row needs of the slices before it; empty where devices hold whole rows."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PatchLayout":
        """Return the layout with every tensor changed, those of the slice too."""
        return PatchLayout(*map(change, self[:-1]), slice=SliceLayout(*map(change, self.slice)) if self.slice else ())


LAYOUT_FIELDS = PatchLayout._fields[:-1]
"""The fields of a whole row."""


class Batch(NamedTuple):
    """Rows of a step, or one context slice of each: what the loader yields and training and evaluation take."""

    ids_BS: torch.Tensor
    """Inputs, integer [B, S]; BOUNDARY_ID where padded."""
    layout: PatchLayout
    labels_BS: torch.Tensor
    """Targets, integer [B, S]; IGNORE_LABEL where there is none."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with every tensor changed, those of the layout too."""
        return Batch(change(self.ids_BS), self.layout.map(change), change(self.labels_BS))

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device, see `to_device`."""
        return self.map(lambda tensor: to_device(tensor, device))


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor on a device; from the host to CUDA without the host waiting.

    Only page-locked memory is copied so. Torch keeps it until the copy is done, whoever lets go of it.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class ContextSlice:
    """Which part of every row a device takes, and how far it looks back."""

    index: int = 0
    """From 0."""
    count: int = 1
    """C; divides the row's segments."""
    window_bytes: int = 1
    """W of the local attention: a byte sees W - 1 bytes before it."""
    reach_bytes: int = 0
    """R: how far before its slice a device needs ids and documents; at least W - 1."""
    halo_slices: int = 0
    """How many slices back the W - 1 bytes before a slice can begin."""


WHOLE_ROW = ContextSlice()


def halo_slices(
    *,
    window_bytes: int,
    slices: int,
    segments_per_slice: int,
    segment_bytes: int,
    segment_patches: int,
    max_patch_bytes: int,
) -> int:
    """Return how many slices back the W - 1 bytes before a slice can begin.

    The packer leaves a segment only when the next patch would overflow its bytes or its patches are used up, so a
    segment that another follows holds at least min(segment_bytes - max_patch_bytes + 1, segment_patches) bytes.

    >>> halo_slices(window_bytes=512, slices=8, segments_per_slice=1, segment_bytes=2048, segment_patches=512,
    ...             max_patch_bytes=512)
    1
    >>> halo_slices(window_bytes=64, slices=8, segments_per_slice=1, segment_bytes=32, segment_patches=20,
    ...             max_patch_bytes=16)
    4
    """
    fewest_bytes = segments_per_slice * min(segment_bytes - max_patch_bytes + 1, segment_patches)
    return min(slices - 1, -(-(window_bytes - 1) // fewest_bytes))


@dataclass(frozen=True)
class RowSplit:
    """How the devices that share rows share the work on patches."""

    slices: int = 1
    """C of `ContextSlice`: a device encodes the patches of one slice."""
    query_part: int = 0
    """Which of `query_parts` equal parts of the row's patch slots asks in the global attention here."""
    query_parts: int = 1
    """Context-parallel degree of the global transformer."""
