"""Trained models in Python: `PretrainedBLT` (`blt_titan.BLT`), `PretrainedEntropyModel` and `Patcher`.

They come from a run's checkpoints and from directories. A directory, or the name of a repository on the hub, holds a
BLT in the layout of `transformers` (its entropy model inside, as the patcher) or in that of the original project
(`original.py`). Either gives the same model.

    model = BLT.from_pretrained("facebook/blt-1b")
    patcher = Patcher.from_pretrained("facebook/blt-1b")
    lengths = patcher.patch_lengths("some text")

A missing tensor, one left over, or one of another shape is an error: others fill it at random with no more than a
warning.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from blt_titan.byte_vocab import BOS_ID, bytes_to_ids
from blt_titan.checkpoint.find import holds_checkpoint
from blt_titan.checkpoint.load import build_meta, load_model
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.hf.config import BESIDE, OUR_KEY, PATCHER_ALONE, entropy_config, why_not_by_itself
from blt_titan.hf.directory import Pretrained
from blt_titan.hf.export import (
    Weights,
    check_entropy_model,
    directory_beside,
    export_hf,
    fingerprints_of,
    install_files,
    stored_weights,
    with_threshold,
)
from blt_titan.hf.names import entropy_name_to_hf
from blt_titan.hf.tensors import Entry, ModuleTensors, NamedTensors, write_safetensors
from blt_titan.hf.tokenizer import ByteTokenizer
from blt_titan.hf.weight_files import read_config
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer, mark_by_model

__all__ = ["ByteTokenizer", "Patcher", "Pretrained", "PretrainedBLT", "PretrainedEntropyModel", "save_pretrained"]


class PretrainedBLT(BLT):
    """A BLT that comes from a checkpoint, a directory or the hub, with what cuts its texts, and goes to a directory."""

    rule: PatchRule | None = None
    """Where its patches begin; None if what it was loaded from does not say."""
    entropies: str = ""
    """The fingerprint of the entropy model that its training text was cut with, if that is known."""
    origin: str = "memory"
    """What it was loaded from: a checkpoint, or a directory."""
    _patcher: "_OnDemand | None" = None

    @property
    def entropy_model(self) -> EntropyModel | None:
        """The entropy model that its patches need, fp32 on the BLT's device; None if there is none.

        Read when it is first asked for. It is no part of the BLT: its parameters are not among the BLT's, and no
        `to(dtype)` rounds them.

        Raises:
            CheckpointError: it is not the one of training, or cannot be read.
        """
        return None if self._patcher is None else self._patcher.model.to(self.decoder.output.weight.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        entropy_model: str | os.PathLike[str] | EntropyModel | None = None,
        threshold: float | None = None,
        revision: str | None = None,
    ) -> "PretrainedBLT":
        """Load a BLT, fp32 on the CPU, in evaluation mode.

        Args:
            path: a checkpoint `step-N`, the folder of a run (its last checkpoint), a directory of either layout, or
                the name of a repository on the hub.
            entropy_model: the entropy model of its patches, or where it lies, likewise; default the one inside, which a
                checkpoint lacks.
            threshold: nats; other patches than in training, by any entropy model.
            revision: of the repository.

        Raises:
            CheckpointError: a checkpoint cannot be read, or holds no BLT.
            FileNotFoundError: naming the file that is not there.
            HFConfigError: if the configuration says what our model cannot compute.
            ValueError: naming tensors that are missing, left over or of another shape.
        """
        if holds_checkpoint(path):
            weights = stored_weights(path)
            if not isinstance(weights.args, BLTArgs):
                raise CheckpointError(f"{weights.origin}: holds an entropy model, not a BLT")
            model = load_model(lambda: cls(weights.args), weights.origin)
            model.rule, model.entropies, model.origin = weights.rule, weights.entropies, weights.origin
            known, inside = weights.entropies, None
        else:
            pretrained = Pretrained(path, revision=revision)
            model = build_meta(lambda: cls(pretrained.blt_args))
            pretrained.fill_blt(model)
            model.rule, model.entropies, model.origin = pretrained.rule, pretrained.entropies, str(path)
            known, inside = pretrained.fingerprint, pretrained.entropy_directory
        other_patches = False
        if threshold is not None:
            as_trained = model.rule
            model.rule, known = with_threshold(model.rule, known, threshold, model.origin)
            other_patches = model.rule != as_trained
            model.entropies = "" if other_patches else model.entropies
        named = entropy_model if entropy_model is not None else inside
        if named is not None and model.rule is not None and model.rule.by_entropy:
            check = None if entropy_model is None else partial(_check_is, known, model.rule, str(entropy_model))
            model._patcher = _OnDemand(partial(_load_entropy_model, named, other_patches), check)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        entropy_model: EntropyModel | None = None,
        rule: PatchRule | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write a directory that `from_pretrained` and, where it can, `transformers` loads; see `save_pretrained`.

        Args:
            directory: made if missing; a model that is there is replaced.
            entropy_model: default its own.
            rule: default its own.
            dtype: of the BLT's weights; fp32 gives back every bit.
        """
        entropies = self.entropies if rule in (None, self.rule) else ""
        save_pretrained(
            self,
            directory,
            entropy_model=entropy_model if entropy_model is not None else self.entropy_model,
            rule=rule or self.rule,
            entropies=entropies,
            dtype=dtype,
        )


class _OnDemand:
    """An entropy model that is read when it is first asked for. No `nn.Module`, so that it is no part of a BLT."""

    def __init__(self, load: Callable[[], EntropyModel], check: Callable[[EntropyModel], None] | None):
        self._load, self._check = load, check

    @cached_property
    def model(self) -> EntropyModel:
        model = self._load()
        if self._check is not None:
            self._check(model)
        return model


def _load_entropy_model(named: str | os.PathLike[str] | EntropyModel, allow_changed: bool) -> EntropyModel:
    if isinstance(named, EntropyModel):
        return copy.deepcopy(named).float()  # the user's own stays where it is, and as it is
    return PretrainedEntropyModel.from_pretrained(named, allow_changed=allow_changed)


def _check_is(fingerprint: str, rule: PatchRule, origin: str, model: EntropyModel) -> None:
    check_entropy_model(fingerprint, Weights(model.args, ModuleTensors(model), origin), rule)


def save_pretrained(
    model: BLT,
    directory: str | os.PathLike[str],
    *,
    entropy_model: EntropyModel | None = None,
    rule: PatchRule | None = None,
    entropies: str = "",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a BLT that is whole on one device as a `transformers` directory, replacing one that is there.

    Where `transformers` can cut texts by the rule, the entropy model becomes its patcher; where it cannot, that lies in
    `entropy_model` beside the BLT, which there needs explicit `patch_lengths` (the model card says so).

    Args:
        model: the BLT.
        directory: made if missing.
        entropy_model: the one that the patches need; left out where the rule reads bytes alone.
        rule: where patches begin.
        entropies: the fingerprint of the entropy model that its training text was cut with, if that is known.
        dtype: of the weights; the entropy model's stay in fp32.

    Raises:
        HFConfigError: naming what `transformers` cannot express.
        CheckpointError: the entropy model is not that one.
    """
    if rule is not None and not rule.by_entropy:
        entropy_model = None
    entropy = None if entropy_model is None else Weights(entropy_model.args, ModuleTensors(entropy_model))
    if entropy is not None:
        check_entropy_model(entropies, entropy, rule)
    export_hf(
        Weights(model.args, ModuleTensors(model), rule=rule, entropies=entropies),
        directory,
        entropy=entropy,
        dtype=dtype,
        force=True,
        overwrite=True,
    )
    if entropy_model is not None and why_not_by_itself(entropy_model.args, rule) is not None:
        _write_alone(entropy_model, Path(directory) / BESIDE, torch.float32)


class PretrainedEntropyModel(EntropyModel):
    """An entropy model that comes from, and goes to, a directory or the hub."""

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, allow_changed: bool = False
    ) -> "PretrainedEntropyModel":
        """Load an entropy model, fp32 on the CPU, in evaluation mode.

        Args:
            path: a checkpoint `step-N` of one, the folder of its run, a directory that holds one alone or in a BLT, of
                either layout, or the name of a repository on the hub.
            revision: of the repository.
            allow_changed: also load one that is no longer what was exported, and cuts texts otherwise.

        Raises:
            CheckpointError: it is not the one that was exported.
            FileNotFoundError: naming the file that is not there.
            HFConfigError: if the configuration says what our model cannot compute.
            ValueError: there is none, or naming tensors that do not fit.
        """
        if holds_checkpoint(path):
            weights = stored_weights(path)
            if not isinstance(weights.args, EntropyModelArgs):
                raise CheckpointError(f"{weights.origin}: holds a BLT, not an entropy model (blt_entropy)")
            return load_model(lambda: cls(weights.args), weights.origin).eval()
        pretrained = Pretrained(path, revision=revision)
        if pretrained.entropy_directory not in (None, pretrained.directory):
            pretrained = Pretrained(pretrained.entropy_directory)
        model = build_meta(lambda: cls(pretrained.entropy_args))
        pretrained.fill_entropy_model(model)
        if not allow_changed:
            pretrained.check_entropy_model(model)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write it alone, as the patcher's part of a `transformers` BLT; transformers itself has no class for that."""
        _write_alone(self, Path(directory), dtype)


def _write_alone(model: EntropyModel, directory: Path, dtype: torch.dtype) -> None:
    tensors = ModuleTensors(model)
    written = {name: tensors.whole(name).to(dtype).float() for name in tensors.shapes}
    fingerprint = next(iter(fingerprints_of(Weights(model.args, NamedTensors(written)))))
    config = {
        "model_type": PATCHER_ALONE,
        "patcher_config": entropy_config(replace(model.args, reset_at_newline=False)),
        OUR_KEY: {"entropy_model": fingerprint, "reset_at_newline": model.args.reset_at_newline},
    }
    entries = [
        Entry(entropy_name_to_hf(name), shape, lambda begin, end, name=name: tensors.rows(name, begin, end), dtype)
        for name, shape in tensors.shapes.items()
    ]
    folder = directory.resolve()
    existing = read_config(folder / "config.json", optional=True)
    if existing and existing.get("model_type") != PATCHER_ALONE:
        raise FileExistsError(f"{folder}: holds a model of another kind; choose another directory")
    with directory_beside(folder) as temporary:
        write_safetensors(temporary, entries, max_shard_bytes=2**62)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        install_files(temporary, folder)


class Patcher:
    """Cuts texts into patches as training does.

    >>> Patcher("space").patches("to be, or not")
    [b'to ', b'be,', b' or ', b'not']

    Args:
        rule: where patches begin; or the name of a registered rule.
        entropy_model: for a rule that needs entropies; None for a rule that reads bytes only.
        settings: of a rule that is named: `threshold`, `stride`, ..., as in `PatchRule`.

    Raises:
        ValueError: the rule is not registered or lacks something; or it needs an entropy model, or takes none.
    """

    def __init__(self, rule: PatchRule | str, entropy_model: EntropyModel | None = None, **settings: Any):
        self.rule = PatchRule(rule, **settings) if isinstance(rule, str) else replace(rule, **settings)
        if faults := list(self.rule.faults()):
            raise ValueError("; ".join(faults))
        self.rule.require(entropy_model=entropy_model is not None)
        if entropy_model is None:
            self._mark = partial(self.rule.mark, include_next=True)
        else:
            self._mark = mark_by_model(EntropyScorer(entropy_model, lanes=1), self.rule)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        entropy_model: str | os.PathLike[str] | EntropyModel | None = None,
        revision: str | None = None,
        allow_changed: bool = False,
    ) -> "Patcher":
        """Load what cuts the texts of a BLT; nothing of the BLT itself is read.

        Args:
            path: of the BLT, as in `PretrainedBLT.from_pretrained`.
            entropy_model: the one that the rule needs, or where it lies; default the one inside.
            revision: of the repository.
            allow_changed: also an entropy model inside that is no longer what was exported, and cuts texts otherwise.

        Raises:
            ValueError: it says no rule, has no entropy model, or as `PretrainedEntropyModel.from_pretrained`.
        """
        if holds_checkpoint(path):
            weights = stored_weights(path)
            rule, known, inside, origin = weights.rule, weights.entropies, None, weights.origin
        else:
            pretrained = Pretrained(path, revision=revision)
            rule, known, origin = pretrained.rule, pretrained.fingerprint, str(pretrained.directory)
            inside = pretrained.entropy_directory or pretrained.directory
        if rule is None:
            raise ValueError(f"{origin}: says no rule by which patches begin")
        if not rule.by_entropy:
            return cls(rule)
        named = entropy_model if entropy_model is not None else inside
        if named is None:
            raise ValueError(f"{origin}: its patches begin by entropy (rule {rule.rule!r}); pass entropy_model")
        model = _load_entropy_model(named, allow_changed)
        if entropy_model is not None:
            _check_is(known, rule, str(entropy_model), model)
        return cls(rule, model)

    @overload
    def patch_lengths(self, text: str | bytes) -> list[int]: ...
    @overload
    def patch_lengths(self, text: Sequence[str | bytes]) -> list[list[int]]: ...
    def patch_lengths(self, text: str | bytes | Sequence[str | bytes]) -> list[int] | list[list[int]]:
        """Return the lengths of the patches of BOS and a text's bytes; their sum counts the next position too.

        These are what `transformers` takes as `patch_lengths`, and `BLT.logits`.

        Args:
            text: one, or several.
        """
        if not isinstance(text, str | bytes):
            return [self.patch_lengths(one) for one in text]
        content = text.encode() if isinstance(text, str) else text
        ids = np.concatenate([[BOS_ID], bytes_to_ids(content)])
        return starts_to_lengths(self._mark(ids)).tolist()

    @overload
    def patches(self, text: str | bytes) -> list[bytes]: ...
    @overload
    def patches(self, text: Sequence[str | bytes]) -> list[list[bytes]]: ...
    def patches(self, text: str | bytes | Sequence[str | bytes]) -> list[bytes] | list[list[bytes]]:
        """Return the bytes of a text's patches, without BOS, which is one of its own.

        Args:
            text: one, or several.
        """
        if not isinstance(text, str | bytes):
            return [self.patches(one) for one in text]
        content = text.encode() if isinstance(text, str) else text
        ends = np.cumsum(self.patch_lengths(content)) - 1
        cut = [content[begin:end] for begin, end in pairwise(ends.tolist())]
        return [patch for patch in cut if patch]
