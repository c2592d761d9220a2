"""Write a `transformers` directory: weights, configuration, tokenizer, model card. One process, little memory.

Everything is written beside the directory first and renamed at the end, so that one that has the name is whole.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from blt_titan.byte_vocab import BOS_ID, EOS_ID, RESERVED_ID
from blt_titan.checkpoint.description import Description, identity
from blt_titan.checkpoint.digest import weights_digest
from blt_titan.checkpoint.find import find_checkpoint
from blt_titan.checkpoint.json_fields import FieldError, read_object
from blt_titan.checkpoint.load import NotDescribedError, build_meta, describe_model, require_shapes
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.data.store.sidecars import SidecarSettings, fingerprint_of
from blt_titan.hf.config import BESIDE, PATCHER_ALONE, HFConfigError, hf_config, why_not_by_itself
from blt_titan.hf.model_card import model_card
from blt_titan.hf.names import blt_name_to_hf, entropy_name_to_hf
from blt_titan.hf.tensors import Entry, StoredTensors, TensorSource, write_safetensors
from blt_titan.hf.tokenizer import tokenizer_files
from blt_titan.hf.weight_files import read_config
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rounding import Storage
from blt_titan.patching.rule import PatchRule

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Weights:
    """A model without its numbers, and where they come from."""

    args: Any
    """BLTArgs or EntropyModelArgs."""
    tensors: TensorSource
    origin: str = "memory"
    rule: PatchRule | None = None
    """Where its patches begin, if that is known."""
    entropies: str = ""
    """The fingerprint of the entropy model that its training text was cut with, if that is known."""


def stored_weights(path: str | os.PathLike[str], *, description: Description | None = None) -> Weights:
    """Return the weights of a checkpoint `step-N`, or of the last one of a run's folder.

    Args:
        path: of the checkpoint.
        description: what model it holds, for a checkpoint that does not say so itself.

    Raises:
        CheckpointError: there is none, it cannot be read, or it does not say what model it holds.
    """
    checkpoint = find_checkpoint(path)
    try:
        description = describe_model(checkpoint)
    except NotDescribedError:
        if description is None:
            raise
    tensors = StoredTensors(checkpoint)
    return Weights(description.args, tensors, str(checkpoint), description.rule, description.entropies)


def with_threshold(rule: PatchRule | None, entropies: str, threshold: float, origin: str) -> tuple[PatchRule, str]:
    """Set a threshold; return the rule, and the fingerprint of training, if the patches are still those.

    Args:
        rule: as the model was trained; None, if it does not say, means `global`.
        entropies: the fingerprint of the entropy model in training.
        threshold: nats.
        origin: of the model, for the error.

    Raises:
        ValueError: the rule has no threshold.
    """
    rule = rule or PatchRule("global", threshold=threshold, max_patch_bytes=512)
    if rule.threshold is None:
        raise ValueError(f"threshold = {threshold}: the rule of {origin} is {rule.rule!r}, which has none")
    changed = replace(rule, threshold=threshold)
    if faults := list(changed.faults()):
        raise ValueError("; ".join(faults))
    # Where other patches than in training are meant, any entropy model may make them.
    return changed, entropies if threshold == rule.threshold else ""


def check_entropy_model(fingerprint: str, entropy: Weights, rule: PatchRule | None = None) -> None:
    """Check that an entropy model is the one that a training text was cut with, and that the rule rounds as it did.

    Args:
        fingerprint: of the one in training; empty if that is not known.
        entropy: what is to cut texts now.
        rule: by which.

    Raises:
        CheckpointError: it is another one.
    """
    if not fingerprint:
        return
    storages = fingerprints_of(entropy)
    if rule is not None and storages.get(fingerprint, rule.storage) != rule.storage:
        raise CheckpointError(
            f"the training text was cut by entropies rounded to {storages[fingerprint]}, but the rule says "
            f"{rule.storage}: take the rule of the model's checkpoint"
        )
    if fingerprint not in storages:
        raise CheckpointError(
            f"{entropy.origin}: is not the entropy model by which the training text was cut, and would cut texts "
            "otherwise; name that one (another --threshold than in training says that other patches are meant)"
        )


def fingerprints_of(entropy: Weights) -> dict[str, Storage]:
    """Return what an entropy model may be known by, each with the storage of entropies that belongs to it."""
    entries = model_entries(entropy, EntropyModel, str, torch.float32)
    digest = weights_digest({entry.name: entry.blocks() for entry in entries})
    return {
        fingerprint_of(SidecarSettings(storage, identity(entropy.args), digest, "float32")): storage
        for storage in get_args(Storage)
    }


def export_hf(
    blt: Weights,
    out: str | os.PathLike[str],
    *,
    entropy: Weights | None = None,
    rule: PatchRule | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    cut_share: float | None = None,
    force: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write what `AutoModelForCausalLM` and `AutoTokenizer` need, offline.

    Args:
        blt: the model.
        out: the directory to write.
        entropy: its entropy model, which becomes the patcher.
        rule: where patches begin; default what `blt` says.
        dtype: of the weights.
        max_shard_bytes: of a file of weights.
        cut_share: of the training text's patches, that the limit cut; for the model card.
        force: also write a model that `transformers` cannot cut texts for; it then needs explicit `patch_lengths`.
        overwrite: replace what is in `out`, if it is a model directory.
        progress: show a progress bar.

    Raises:
        HFConfigError: what `transformers` cannot express.
        CheckpointError: a tensor is missing, left over or of another shape.
        FileExistsError: `out` is there, and is not to be replaced.
    """
    # Resolved: `folder/..` would name something else once `folder` is there.
    out, rule = Path(out).resolve(), rule or blt.rule
    _check_inputs(blt, entropy, rule)
    _check_free(out, overwrite)
    alone = why_not_by_itself(entropy.args if entropy else None, rule)
    if alone and not force:
        raise HFConfigError(f"{alone}. --force writes the weights all the same, for use with explicit patch_lengths")
    patcher = None if alone else entropy
    fingerprint = ""
    if patcher is not None:
        check_entropy_model(blt.entropies, patcher, rule)
        assert rule is not None
        fingerprint = next(key for key, storage in fingerprints_of(patcher).items() if storage == rule.storage)
    config = hf_config(
        blt.args,
        patcher.args if patcher else None,
        rule,
        dtype=dtype,
        entropies=blt.entropies,
        entropy_model=fingerprint,
    )
    entries = model_entries(blt, BLT, blt_name_to_hf, dtype)
    if patcher is not None:
        # In fp32: rounded weights would cut texts elsewhere than in training.
        entries += model_entries(patcher, EntropyModel, entropy_name_to_hf, torch.float32)
    with directory_beside(out) as temporary:
        for name, content in _texts(config).items():
            (temporary / name).write_text(content, encoding="utf-8")
        card = model_card(
            blt.args,
            patcher.args if patcher else None,
            rule,
            parameters=sum(math.prod(entry.shape) for entry in entries),
            dtype=config["dtype"],
            origin=Path(blt.origin).name if blt.origin != "memory" else blt.origin,
            alone=alone,
            cut_share=cut_share,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_safetensors(temporary, entries, max_shard_bytes=max_shard_bytes, progress=progress)
        # What came there meanwhile is not ours.
        _check_free(out, overwrite)
        install_files(temporary, out)
    return out


@contextmanager
def directory_beside(out: Path) -> Iterator[Path]:
    """Make a directory beside another; what is in it is removed if it cannot be finished."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _texts(config: dict[str, Any]) -> dict[str, str]:
    """Return the files of JSON by name: configuration, how to generate, tokenizer."""
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": RESERVED_ID, "use_cache": False}
    files = {"config.json": config, "generation_config.json": generation}
    files |= tokenizer_files(config["encoder_config"]["max_position_embeddings"])
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()}


def _check_inputs(blt: Weights, entropy: Weights | None, rule: PatchRule | None) -> None:
    for weights, kind in ((blt, BLTArgs), (entropy, EntropyModelArgs)):
        if weights is not None and not isinstance(weights.args, kind):
            wanted, other = ("a BLT", "an entropy model") if kind is BLTArgs else ("an entropy model", "a BLT")
            raise CheckpointError(f"{weights.origin}: holds {other}, where {wanted} is wanted")
    if faults := list(rule.faults("patching.") if rule is not None else ()):
        raise HFConfigError("; ".join(faults))


_REPLACED = ".config.json.replaced"
"""The configuration of a model directory while its files are replaced, and after that was interrupted."""


def install_files(temporary: Path, out: Path) -> None:
    """Give finished files of a model directory their place; other files that are there stay."""
    if not out.exists():
        temporary.rename(out)
        return
    new = {path.name for path in temporary.iterdir()}
    # What an earlier model had beside it would be taken for the new one's.
    entropy_model_beside = read_config(out / BESIDE / "config.json", optional=True).get("model_type") == PATCHER_ALONE
    # Without a configuration there is no model, until the new one stands last.
    if (out / "config.json").exists():
        os.replace(out / "config.json", out / _REPLACED)
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
        for path in out.glob(pattern):
            if path.name not in new:
                path.unlink()
    if entropy_model_beside:
        shutil.rmtree(out / BESIDE)
    for name in sorted(new, key=lambda name: name == "config.json"):
        os.replace(temporary / name, out / name)
    (out / _REPLACED).unlink(missing_ok=True)
    temporary.rmdir()


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out}: is there already; choose another directory, or pass --overwrite")
    config = out / "config.json"
    if not config.is_file():
        config = out / _REPLACED
    if not config.is_file():
        raise FileExistsError(f"{out}: is there and is not a model directory (no config.json), so it is not replaced")
    try:
        kind = read_object(config).get("model_type")
    except FieldError:
        kind = "unreadable"
    if kind != "blt":
        raise FileExistsError(f"{out}: holds another model ({kind!r} in its config.json), so it is not replaced")


def model_entries(weights: Weights, kind: Any, translate: Any, dtype: torch.dtype) -> list[Entry]:
    """Return what is to be written of a model.

    Args:
        weights: of the model.
        kind: its class, built from the arguments.
        translate: its parameters' names into those to be written.
        dtype: to write.

    Raises:
        CheckpointError: the tensors are not exactly those of the model.
    """

    def rows_of(name: str):
        return lambda begin, end: weights.tensors.rows(name, begin, end)

    shapes = check_names(weights, kind)
    return [Entry(translate(name), shape, rows_of(name), dtype) for name, shape in shapes.items()]


def check_names(weights: Weights, kind: Any) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each parameter of a model.

    Args:
        weights: of the model.
        kind: its class, built from the arguments.

    Raises:
        CheckpointError: the tensors are not exactly those of the model.
    """
    return require_shapes(build_meta(lambda: kind(weights.args)), weights.tensors.shapes, weights.origin)
