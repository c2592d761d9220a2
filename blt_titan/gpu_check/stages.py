"""The stages by name, in the order of a half-hour: what tells most comes first."""

from blt_titan.gpu_check import attention, runs, serving, trace, training
from blt_titan.gpu_check.stage import Stage

_ALL = {**training.STAGES, **trace.STAGES, **attention.STAGES, **serving.STAGES, **runs.STAGES}
_ORDER = ("tests", "train-1b", "profile", "attention", "memory", "train-8b", "scoring", "generation", "run")
STAGES: dict[str, Stage] = {name: _ALL[name] for name in _ORDER}
