"""Our sections of a run's TOML; torchtitan merges them into its own (`job.custom_config_module`).

Where torchtitan has a key, that key is used: `training.dataset_path` is the directory of byte shards, `training.seq_len`
the bytes of a row, `training.local_batch_size` the rows of a micro-batch, `debug.seed` the seed of the weights.
"""

# No `from __future__ import annotations` here: torchtitan's merge reads the annotations as types.
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Data:
    """How byte shards become rows."""

    streams: int = 3840
    """
    Streams of the run: row n comes from stream n mod streams. Kept in the checkpoint, never changed within a run.
    Data-parallel ranks must divide it, and the data must hold at least as many record batches.
    """
    segment_bytes: int = 2048
    """Byte slots of one segment of a row; must divide training.seq_len and hold patching.max_patch_bytes."""
    segment_patches: int = 512
    """Patch slots of one segment of a row."""
    seed: int = 0
    """Another seed, another order of the data."""
    verify_bytes_at_start: int = 256 * 1024 * 1024
    """
    Data up to this size is checked byte by byte before training; of larger data only the structure, and each record
    batch when it is read.
    """


@dataclass
class Patching:
    """Where patches begin."""

    rule: Literal["space", "static", "byte"] = "space"
    """'space': at spaces and punctuation; 'static': every `stride` bytes; 'byte': everywhere."""
    stride: int | None = None
    """Bytes of a patch under rule = 'static'."""
    max_patch_bytes: int = 512
    """Longer patches are split; at most data.segment_bytes."""


@dataclass
class Checkpoint:
    """Defaults that differ from torchtitan's."""

    last_save_model_only: bool = False
    """True leaves only weights in the last checkpoint, so that a finished run cannot be continued."""


@dataclass
class JobConfig:
    """What is merged into torchtitan's JobConfig."""

    data: Data = field(default_factory=Data)
    patching: Patching = field(default_factory=Patching)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
