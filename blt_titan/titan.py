"""Let torchtitan run on machines without an accelerator.

torchtitan 0.2.2 decides at import that the device is "cuda" when it finds none, and then asks a CUDA-like module for
names and memory. Importing this module first makes it find the CPU instead, with a module that answers those
questions; on a machine with an accelerator it changes nothing. So every module of ours that imports torchtitan imports
this one before.
"""

import math
import platform
from types import ModuleType, SimpleNamespace

import torch
import torch._utils


def _cpu_module() -> ModuleType:
    """Make a stand-in for `torch.cuda` that speaks of the CPU."""
    module = ModuleType("blt_titan.titan.cpu")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
    module.__dict__.update(
        set_device=lambda device: None,
        current_device=lambda: 0,
        get_device_name=lambda device=None: platform.processor() or platform.machine(),
        # 1, not 0: torchtitan divides by it, and there are no memory figures to give.
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=1),
        memory_stats=lambda device=None: {},
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
    )
    return module


def _import_torchtitan() -> None:
    if torch._utils._get_available_device_type() is not None:
        return
    originals = torch._utils._get_available_device_type, torch._utils._get_device_module
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: _cpu_module()
    try:
        import torchtitan.tools.utils
    finally:
        torch._utils._get_available_device_type, torch._utils._get_device_module = originals
    # It would look for a GPU with lspci and then take an A100's figure, with two warnings.
    torchtitan.tools.utils.get_peak_flops = lambda device_name: math.nan


_import_torchtitan()
