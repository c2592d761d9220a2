"""Batches on the device that computes: each is copied there while the one before it computes.

In: batches on the host, as the loaders yield them. Out: the same on the device, in order.

The decision that is not obvious: one batch ahead and no more. A step of 80 micro-batches then begins when the second of
them has been made, and the device holds two or three at a time however far the host runs ahead of it. On CUDA the
copies have a stream of their own, which waits for what the computing stream was given before: memory that the host has
let go of is written again only after its last use.

    host      fetch 0  copy 0  fetch 1  copy 1  [compute 0]  fetch 2  copy 2  [compute 1]  ...
    copies             0                1                             2 (waits for compute 0)
    computes                                     0 (waits for copy 0) ...     1 (waits for copy 1)
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

import torch

from blt_titan.batch import Batch


def copied_ahead(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Yield the batches on `device`, each after the copy of the next has begun."""
    device = torch.device(device)
    begin = partial(_begin_beside, _copy_stream(device)) if device.type == "cuda" else _begin_in_turn(device)
    arrive = None
    for batch in batches:
        following = begin(batch)
        if arrive is not None:
            yield arrive()
        arrive = following
    if arrive is not None:
        yield arrive()


def _begin_in_turn(device: torch.device) -> Callable[[Batch], Callable[[], Batch]]:
    def begin(batch: Batch) -> Callable[[], Batch]:
        copied = batch.to(device)
        return lambda: copied

    return begin


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of copies to a device: the allocator keeps memory apart by stream."""
    return torch.cuda.Stream(device)


def _begin_beside(stream: torch.cuda.Stream, batch: Batch) -> Callable[[], Batch]:
    """Begin to copy a batch on another stream; what is returned has the computing stream wait for it."""
    # The memory that the copy is given may have been that of a batch which the device has not done with.
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copied = batch.to(stream.device)
    done = stream.record_event()

    def arrive() -> Batch:
        torch.cuda.current_stream(stream.device).wait_event(done)
        return copied

    return arrive
