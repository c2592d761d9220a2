"""The one door to torchtitan: what we use of it, made to run on machines without an accelerator.

torchtitan 0.2.2 decides at import that the device is "cuda" when it finds none, and then asks a CUDA-like module for
names and memory. This module lets it find the CPU instead, with a stand-in that answers those questions; on a machine
with an accelerator it changes nothing. The order matters, so nothing else in `blt_titan` or `parallelisms` imports
torchtitan (`lint-imports` holds that). It takes seconds: what needs no run does not import it.
"""

# ruff: noqa: E402 (torchtitan is imported after the stand-in is in place)

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def _cpu_for_want_of_an_accelerator() -> Iterator[None]:
    """Have torch name the CPU as the accelerator, if there is none, for as long as torchtitan asks."""
    if torch._utils._get_available_device_type() is not None:
        yield
        return
    originals = torch._utils._get_available_device_type, torch._utils._get_device_module
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: _cpu_module()
    try:
        yield
    finally:
        torch._utils._get_available_device_type, torch._utils._get_device_module = originals


with _cpu_for_want_of_an_accelerator():
    import torchtitan.tools.utils

if torchtitan.tools.utils.device_type == "cpu":
    # It would look for a GPU with lspci and then take an A100's figure, with two warnings.
    torchtitan.tools.utils.get_peak_flops = lambda device_name: math.nan

import torchtitan.train
from torchtitan.components.checkpoint import MODEL, OPTIMIZER, CheckpointManager
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.quantization.float8 import Float8LinearConverter
from torchtitan.components.validate import BaseValidator
from torchtitan.config import (
    TORCH_DTYPE_MAP,
    ActivationCheckpoint,
    Checkpoint,
    ConfigManager,
    JobConfig,
    LRScheduler,
    Metrics,
    Model,
    Parallelism,
    Profiling,
    Training,
    Validation,
)
from torchtitan.config.job_config import Comm, Compile, DataLoader, Debug, Float8Linear
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.pipeline_parallel import build_pipeline_schedule
from torchtitan.distributed.utils import set_pg_timeouts
from torchtitan.protocols import model_converter
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.utils import device_type, get_peak_flops, has_cuda_capability
from torchtitan.train import Trainer

__all__ = [
    "MODEL",
    "OPTIMIZER",
    "TORCH_DTYPE_MAP",
    "ActivationCheckpoint",
    "BaseValidator",
    "Checkpoint",
    "CheckpointManager",
    "Comm",
    "Compile",
    "ConfigManager",
    "DataLoader",
    "DataloaderExhaustedError",
    "Debug",
    "Float8Linear",
    "Float8LinearConverter",
    "JobConfig",
    "LRScheduler",
    "Metrics",
    "MetricsProcessor",
    "Model",
    "ParallelDims",
    "Parallelism",
    "Profiling",
    "TrainSpec",
    "Trainer",
    "Training",
    "Validation",
    "apply_ac",
    "build_lr_schedulers",
    "build_model_converters",
    "build_optimizers",
    "build_pipeline_schedule",
    "device_type",
    "get_peak_flops",
    "has_cuda_capability",
    "init_logger",
    "logger",
    "register_train_spec",
    "replace_converter",
    "set_pg_timeouts",
    "use_checkpoint_manager",
]


def use_checkpoint_manager(cls: type[CheckpointManager]) -> None:
    """Have trainers make their checkpoints with `cls`: torchtitan names its own, and asks for no other."""
    torchtitan.train.CheckpointManager = cls


def replace_converter(name: str, cls: type[model_converter.ModelConverter]) -> None:
    """Register a model converter in place of torchtitan's of that name."""
    model_converter._registry_model_converter_cls[name] = cls
