"""What the clock of a rank's blocks holds, and what it leaves out."""

import time
from typing import Any

import pytest
import torch
import torch.nn as nn

from blt_titan.training.block_times import BlockTimes

WAIT_S = 0.2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


@pytest.mark.parametrize("compiled", [False, True])
def test_only_blocks_are_timed_and_not_what_is_waited_for_around_them(compiled):
    part, blocks = nn.Module(), [Block(), Block()]
    part.layers = nn.ModuleDict({str(number): block for number, block in enumerate(blocks)})
    wait: Any = torch.compiler.disable(lambda *of: time.sleep(WAIT_S))
    for block in blocks:
        if compiled:
            block.compile(backend="eager", fullgraph=True, dynamic=False)
        # As FSDP does, before the times are there.
        block.register_forward_pre_hook(wait, prepend=True)
        block.register_forward_hook(wait)
    times = BlockTimes([part], torch.device("cpu"))

    def forward() -> None:
        x = torch.ones(2, 4)
        for block in blocks:
            x = block(x)

    forward()
    assert times.take() == 0, "nobody asked"
    times.on = True
    forward()
    assert 0 < times.take() < WAIT_S
    assert times.take() == 0
