"""What a card can do, and what is assumed of it: figures of data sheets, and shares of them that kernels reach.

Nothing here is measured by this project. A roofline is as good as these figures, which is why they stand in one place
and are printed beside every estimate.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Beside:
    """Memory of a card that no tensor of a run holds: assumptions, not measurements."""

    context_bytes: int = round(0.6 * GIB)
    """CUDA context with the kernels of torch and its libraries."""
    nccl_bytes: int = round(1.5 * GIB)
    """Buffers of NCCL's communicators."""
    workspace_bytes: int = round(0.3 * GIB)
    """Workspaces of cuBLAS and of Triton's kernels."""
    fragmentation_share: float = 0.03
    """Share of the peak that the allocator holds and cannot use, with expandable segments."""

    def bytes_of(self, peak_bytes: int) -> int:
        """Return what a run with this peak of live tensors needs beside them."""
        fixed = self.context_bytes + self.nccl_bytes + self.workspace_bytes
        return fixed + round(self.fragmentation_share * peak_bytes)


@dataclass(frozen=True)
class Card:
    """A GPU, as the dry run and the roofline see it."""

    name: str
    device_name: str
    """The name that torch gives it."""
    memory_bytes: int
    """What torch says that it has."""
    capability: tuple[int, int]
    """Compute capability."""
    multiprocessors: int
    shared_bytes: int
    """Shared memory that a block may have."""
    bytes_per_s: float
    """Bandwidth of its memory, by the data sheet."""
    bf16_flops: float
    """Dense matrix multiplications, by the data sheet."""
    float8_flops: float
    """Likewise."""
    bandwidth_share: float = 0.80
    """Share of the bandwidth that a kernel reaches."""
    matmul_share: float = 0.70
    """Share of the dense figure that a large matrix multiplication reaches."""
    window_attention_share: tuple[float, float] = (0.25, 0.20)
    """Share of the dense bf16 figure of windowed attention, forward and backward, over the tiles that it visits."""
    causal_attention_share: tuple[float, float] = (0.40, 0.30)
    """Likewise of causal attention."""
    launch_s: float = 1e-6
    """What a kernel costs beside its work, where launches are hidden behind others."""
    beside: Beside = Beside()


CARDS = {
    "h100": Card(
        name="h100",
        device_name="NVIDIA H100 80GB HBM3",
        memory_bytes=round(79.1 * GIB),
        capability=(9, 0),
        multiprocessors=132,
        shared_bytes=232_448,
        bytes_per_s=3.35e12,
        bf16_flops=989e12,
        float8_flops=1979e12,
    ),
    "h200": Card(
        name="h200",
        device_name="NVIDIA H200",
        memory_bytes=round(139.8 * GIB),
        capability=(9, 0),
        multiprocessors=132,
        shared_bytes=232_448,
        bytes_per_s=4.8e12,
        bf16_flops=989e12,
        float8_flops=1979e12,
    ),
    "b200": Card(
        name="b200",
        device_name="NVIDIA B200",
        memory_bytes=round(178.3 * GIB),
        capability=(10, 0),
        multiprocessors=148,
        shared_bytes=232_448,
        bytes_per_s=8e12,
        bf16_flops=2250e12,
        float8_flops=4500e12,
    ),
}
"""The cards by the name that --gpu takes."""
