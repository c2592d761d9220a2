"""The type of a run's settings: torchtitan's JobConfig with our sections.

The class that is instantiated is made by `config.read`, which has torchtitan merge the two; this one is what functions
that need the whole run are annotated with. Functions that need one section take that section.
"""

from blt_titan.job_config import (
    Data,
    EntropyModelSettings,
    Export,
    Failure,
    HashEmbeddingSettings,
    Heartbeat,
    LocalBlocks,
    Monitor,
    Patching,
)
from blt_titan.job_config import Model as OurModel
from blt_titan.titan import JobConfig, Model


class ModelSettings(OurModel, Model):
    """torchtitan's section with our keys."""


class RunConfig(JobConfig):
    """All settings of a run; `config.read.load_run_config` makes it."""

    model: ModelSettings  # pyright: ignore[reportIncompatibleVariableOverride]
    data: Data
    patching: Patching
    hash_embedding: HashEmbeddingSettings
    entropy_model: EntropyModelSettings
    local_blocks: LocalBlocks
    export: Export
    monitor: Monitor
    failure: Failure
    heartbeat: Heartbeat
