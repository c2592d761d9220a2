"""The tensors of a layout by name, for tests that go through all of them."""

import torch

from blt_titan.batch import LAYOUT_FIELDS, PatchLayout, SliceLayout


def fields_of(layout: PatchLayout) -> dict[str, torch.Tensor]:
    whole = dict(zip(LAYOUT_FIELDS, layout, strict=False))
    return whole | (layout.slice._asdict() if isinstance(layout.slice, SliceLayout) else {})
