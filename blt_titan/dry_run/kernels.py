"""What a Triton kernel needs of a multiprocessor, read from its machine code without a card."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from blt_titan.dry_run.cards import Card


@dataclass(frozen=True)
class Kernel:
    """A kernel; of several configurations that Inductor would try on a card, the one that spills least."""

    name: str
    registers: int
    stack_bytes: int
    """Bytes of local memory per thread: registers that were spilled, or arrays that did not fit."""
    shared_bytes: int
    warps: int
    configuration: str
    moved_bytes: int
    """What it reads and writes, by Inductor's count; 0 where it gives none."""
    over_shared: bool
    """It wants more shared memory than a block may have."""

    @property
    def spills(self) -> bool:
        """Tell whether it keeps registers in memory."""
        return self.stack_bytes > 0


def use_target(card: Card) -> None:
    """Have Triton compile for a card."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    target = GPUTarget("cuda", card.capability[0] * 10 + card.capability[1], 32)
    limits = {
        "max_shared_mem": card.shared_bytes,
        "multiprocessor_count": card.multiprocessors,
        "warpSize": 32,
        "max_num_regs": 65_536,
        "sm_clock_rate": 1_980_000,
        "mem_clock_rate": 2_619_000,
        "mem_bus_width": 5120,
    }

    class Driver(CudaDriver):
        """A driver of a card that is not here."""

        def __init__(self):
            self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return card.capability

    CudaDriver.is_active = staticmethod(lambda: True)
    triton.runtime.driver.set_active(Driver())


def resources(tuner: Any, card: Card) -> Kernel:
    """Return what the kernel of one of Inductor's tuners needs, whose configurations are compiled."""
    kernels = [_of_configuration(tuner, result, card) for result in tuner.compile_results or []]
    assert kernels, "a kernel without a configuration"
    return min(kernels, key=lambda kernel: (kernel.over_shared, kernel.stack_bytes))


def _of_configuration(tuner: Any, result: Any, card: Card) -> Kernel:
    registers, stack = _usage(result.kernel.asm["cubin"])
    metadata = result.kernel.metadata
    return Kernel(
        name=tuner.inductor_meta.get("kernel_name") or tuner.fn.__name__,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=metadata.shared,
        warps=metadata.num_warps,
        configuration=str(result.config),
        moved_bytes=round((tuner.inductor_meta.get("kernel_num_gb") or 0) * 1e9),
        over_shared=metadata.shared > card.shared_bytes,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes of its stack."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert match is not None, said.stdout
    return int(match[1]), int(match[2])
