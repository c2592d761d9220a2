"""Lines of torchtitan's log that are not true of our runs, or mean nothing on a CPU, and would send users searching."""

import logging

from blt_titan.titan import device_type, logger

_UNTRUE = (
    # fully_shard is always applied.
    "Mixed precision training with TP or PP is only supported when FSDP/HSDP/CP is enabled",
    # The loss is summed over ranks, and rank 0 logs it.
    "Pipeline Parallel loss is not visible",
)
_MEANINGLESS_ON_CPU = (
    "CPU capacity:",
    "CPU memory usage for model:",
    "Peak FLOPS used for computing MFU:",
    "ENV[TORCH_NCCL_",
    "ENV[TORCH_FR_",
)


class LineFilter(logging.Filter):
    """Drops what does not hold, and where `device` is "cpu" also figures of accelerators and settings of NCCL."""

    def __init__(self, device: str):
        super().__init__()
        self._dropped = _UNTRUE + (_MEANINGLESS_ON_CPU if device == "cpu" else ())

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record may pass."""
        message = record.getMessage()
        return not any(text in message for text in self._dropped)


_FILTER = LineFilter(device_type)


def drop_misleading_lines() -> None:
    """Filter torchtitan's logger from now on; once is enough."""
    logger.addFilter(_FILTER)
