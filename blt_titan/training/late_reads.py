"""Numbers that a step leaves on the device, read by the host a few steps later, so that it does not wait for them.

On a GPU the host runs ahead of the device. What it wants to know of a step is copied beside it, and looked at when the
device has long done it:

    step 7   put(...)   take() -> nothing yet
    step 8   put(...)   take() -> nothing yet
    step 9   put(...)   take() -> those of step 7

All ranks that put in the same steps are given the same steps at the same time, so they may act on them together.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

LOOKED_BACK = {"cpu": 0}
"""By type of device, how many steps ago that was which a host looks at; `_FAR_BACK` where a host runs ahead."""
_FAR_BACK = 2

Tag = TypeVar("Tag")


class LateReads(Generic[Tag]):
    """Tensors of steps, in the order in which they were put."""

    def __init__(self) -> None:
        self._held: deque[tuple[Tag, torch.Tensor, Any]] = deque()

    def put(self, tag: Tag, tensor: torch.Tensor) -> None:
        """Keep a tensor of the step just made; nothing waits for it here."""
        if tensor.device.type != "cuda":
            self._held.append((tag, tensor, None))
            return
        self._held.append((tag, tensor.to("cpu", non_blocking=True), torch.cuda.current_stream().record_event()))

    def take(self, device_type: str) -> Iterator[tuple[Tag, torch.Tensor]]:
        """Yield what was put so many steps ago, or longer, as the device's type says; asked once after each step."""
        return self._take(LOOKED_BACK.get(device_type, _FAR_BACK))

    def take_all(self) -> Iterator[tuple[Tag, torch.Tensor]]:
        """Yield all that was put; waits for the device."""
        return self._take(0)

    def forget(self) -> None:
        """Let go of what was put."""
        self._held.clear()

    def _take(self, left: int) -> Iterator[tuple[Tag, torch.Tensor]]:
        while len(self._held) > left:
            tag, tensor, copied = self._held.popleft()
            if copied is not None:
                copied.synchronize()
            yield tag, tensor
