"""Rules on rows, the text they are made of, and where its patches begin. Each yields sentences."""

from collections.abc import Iterator

from blt_titan.job_config import Data, Patching
from blt_titan.patching.rule import PatchRule
from blt_titan.titan import Training, Validation


def text(training: Training, data: Data) -> Iterator[str]:
    """The text is one directory, or a mixture of several."""
    if data.mixture and training.dataset_path is not None:
        yield (
            f"training.dataset_path = {training.dataset_path!r} with data.mixture of {len(data.mixture)} directories: "
            "set one of them"
        )
    elif not data.mixture and training.dataset_path is None:
        yield "training.dataset_path is not set: name a directory made by `blt-titan prepare`"


def lengths(training: Training, validation: Validation, data: Data) -> Iterator[str]:
    """A row is a whole number of segments."""
    rows = {"training.seq_len": training.seq_len}
    if validation.seq_len != -1:
        rows["validation.seq_len"] = validation.seq_len
    for key, seq_len in rows.items():
        if seq_len % data.segment_bytes:
            yield (
                f"{key} = {seq_len}: a row is a whole number of segments, so it must be a multiple of "
                f"data.segment_bytes = {data.segment_bytes}"
            )


def patches(patching: Patching, data: Data) -> Iterator[str]:
    """A patch lies in one segment."""
    if patching.max_patch_bytes > data.segment_bytes:
        yield (
            f"patching.max_patch_bytes = {patching.max_patch_bytes}: must be 1 to data.segment_bytes = "
            f"{data.segment_bytes}, because a patch lies in one segment"
        )


def patch_rule(patching: Patching) -> Iterator[str]:
    """A patching rule has the settings that it uses, and no others."""
    yield from PatchRule.of(patching).faults("patching.")


def entropies(patching: Patching) -> Iterator[str]:
    """Entropies come from a sidecar or from a model, where the rule asks for some."""
    online = patching.source == "online"
    if not PatchRule.of(patching).by_entropy:
        if online:
            yield (f"patching.source = 'online' with patching.rule = {patching.rule!r}, which asks for no entropies")
    elif online != (patching.entropy_checkpoint is not None):
        yield (
            f"patching.source = {patching.source!r} with patching.entropy_checkpoint = "
            f"{patching.entropy_checkpoint!r}: 'online' needs a checkpoint of an entropy model, 'sidecar' takes none"
        )
