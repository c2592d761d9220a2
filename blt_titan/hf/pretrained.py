"""Released models: `BLT.from_pretrained`, `EntropyModel.from_pretrained`, `Patcher.from_pretrained`, `save_pretrained`.

A directory, or the name of a repository on the hub, holds a BLT in the layout of `transformers` (its entropy model
inside, as the patcher) or in that of the original project (`original.py`). Either gives the same model.

    model = BLT.from_pretrained("facebook/blt-1b")
    patcher = Patcher.from_pretrained("facebook/blt-1b")
    lengths = patcher.patch_lengths("some text")

A missing tensor, one left over, or one of another shape is an error: others fill it at random with no more than a
warning.
"""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from blt_titan.byte_vocab import BOS_ID, bytes_to_ids
from blt_titan.checkpoint.load import build_meta
from blt_titan.hf.config import (
    OUR_KEY,
    entropy_config,
)
from blt_titan.hf.directory import Pretrained
from blt_titan.hf.export import Weights, directory_beside, export_hf, fingerprints_of, install_files
from blt_titan.hf.names import entropy_name_to_hf
from blt_titan.hf.tensors import Entry, ModuleTensors, NamedTensors, write_safetensors
from blt_titan.hf.tokenizer import ByteTokenizer
from blt_titan.hf.weight_files import read_config
from blt_titan.model.blt import BLT as BareBLT
from blt_titan.model.entropy_model import EntropyModel as BareEntropyModel
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer, mark_by_model

__all__ = ["BLT", "ByteTokenizer", "EntropyModel", "Patcher", "Pretrained"]

_PATCHER_ALONE = "blt_patcher"


class BLT(BareBLT):
    """A BLT that comes from, and goes to, a directory or the hub."""

    rule: PatchRule | None = None
    """Where its patches begin, as its directory says."""
    entropies: str = ""
    """The fingerprint of the entropy model that its training text was cut with, if its directory says it."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> "BLT":
        """Load a BLT, fp32 on the CPU, in evaluation mode.

        Args:
            path: a directory, or the name of a repository on the hub, of either layout.
            revision: of the repository.

        Raises:
            FileNotFoundError: naming the file that is not there.
            HFConfigError: if the configuration says what our model cannot compute.
            ValueError: naming tensors that are missing, left over or of another shape.
        """
        pretrained = Pretrained(path, revision=revision)
        model = build_meta(lambda: cls(pretrained.blt_args))
        pretrained.fill_blt(model)
        model.rule, model.entropies = pretrained.rule, pretrained.entropies
        return model.eval()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        entropy_model: BareEntropyModel | None = None,
        rule: PatchRule | None = None,
        dtype: torch.dtype = torch.float32,
        force: bool = False,
    ) -> None:
        """Write it as a `transformers` directory; see `export_hf` for the rest."""
        entropies = self.entropies if rule in (None, self.rule) else ""
        save_pretrained(
            self,
            directory,
            entropy_model=entropy_model,
            rule=rule or self.rule,
            entropies=entropies,
            dtype=dtype,
            force=force,
        )


def save_pretrained(
    model: BareBLT,
    directory: str | os.PathLike[str],
    *,
    entropy_model: BareEntropyModel | None = None,
    rule: PatchRule | None = None,
    entropies: str = "",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> None:
    """Write a BLT that is whole on one device as a `transformers` directory, replacing one that is there.

    Args:
        model: the BLT.
        directory: made if missing.
        entropy_model: becomes the patcher.
        rule: where patches begin.
        entropies: the fingerprint of the entropy model that its training text was cut with, if that is known.
        dtype: of the weights.
        force: also without a rule that `transformers` knows; it then needs explicit `patch_lengths`.

    Raises:
        HFConfigError: naming what `transformers` cannot express.
        CheckpointError: the entropy model is not that one.
    """
    entropy = Weights(entropy_model.args, ModuleTensors(entropy_model)) if entropy_model is not None else None
    export_hf(
        Weights(model.args, ModuleTensors(model), rule=rule, entropies=entropies),
        directory,
        entropy=entropy,
        dtype=dtype,
        force=force,
        overwrite=True,
    )


class EntropyModel(BareEntropyModel):
    """An entropy model that comes from, and goes to, a directory or the hub."""

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, allow_changed: bool = False
    ) -> "EntropyModel":
        """Load the entropy model of a BLT directory, or one that is alone; fp32 on the CPU, in evaluation mode.

        Args:
            path: a directory, or the name of a repository on the hub, of either layout.
            revision: of the repository.
            allow_changed: also load one that is no longer what was exported, and cuts texts otherwise.

        Raises:
            CheckpointError: it is not the one that was exported.
            FileNotFoundError: naming the file that is not there.
            HFConfigError: if the configuration says what our model cannot compute.
            ValueError: there is none, or naming tensors that do not fit.
        """
        pretrained = Pretrained(path, revision=revision)
        model = build_meta(lambda: cls(pretrained.entropy_args))
        pretrained.fill_entropy_model(model)
        if not allow_changed:
            pretrained.check_entropy_model(model)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write it alone: the patcher's part of a `transformers` BLT. transformers itself has no class for that.

        Raises:
            HFConfigError: naming what the configuration cannot express.
        """
        tensors = ModuleTensors(self)
        written = {name: tensors.whole(name).to(dtype).float() for name in tensors.shapes}
        fingerprint = next(iter(fingerprints_of(Weights(self.args, NamedTensors(written)))))
        config = {
            "model_type": _PATCHER_ALONE,
            "patcher_config": entropy_config(self.args),
            OUR_KEY: {"entropy_model": fingerprint},
        }
        entries = [
            Entry(entropy_name_to_hf(name), shape, lambda begin, end, name=name: tensors.rows(name, begin, end), dtype)
            for name, shape in tensors.shapes.items()
        ]
        folder = Path(directory).resolve()
        existing = read_config(folder / "config.json", optional=True)
        if existing and existing.get("model_type") != _PATCHER_ALONE:
            raise FileExistsError(f"{folder}: holds a model of another kind; choose another directory")
        with directory_beside(folder) as temporary:
            write_safetensors(temporary, entries, max_shard_bytes=2**62)
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            install_files(temporary, folder)


class Patcher:
    """Cuts texts into patches as training does.

    Args:
        entropy_model: is taken over by the patcher; None for a rule that reads bytes only.
        rule: where patches begin.
    """

    def __init__(self, entropy_model: BareEntropyModel | None, rule: PatchRule):
        rule.require(entropy_model=entropy_model is not None)
        self.rule = rule
        if entropy_model is None:
            self._mark = partial(rule.mark, include_next=True)
        else:
            self._mark = mark_by_model(EntropyScorer(entropy_model, lanes=1), rule)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, allow_changed: bool = False
    ) -> "Patcher":
        """Load the entropy model and the rule of a BLT directory; arguments as of `EntropyModel.from_pretrained`.

        Raises:
            ValueError: it has none, or as `EntropyModel.from_pretrained`.
        """
        pretrained = Pretrained(path, revision=revision)
        if pretrained.rule is None:
            raise ValueError(f"{pretrained.directory}: says no rule by which patches begin")
        model = None
        if pretrained.rule.by_entropy:
            model = EntropyModel.from_pretrained(pretrained.directory, allow_changed=allow_changed)
        return cls(model, pretrained.rule)

    def patch_lengths(self, text: str | bytes) -> list[int]:
        """Return the lengths of the patches of BOS and a text's bytes; their sum counts the next position too.

        These are what `transformers` takes as `patch_lengths`, and `BLT.logits`.
        """
        content = text.encode() if isinstance(text, str) else text
        ids = np.concatenate([[BOS_ID], bytes_to_ids(content)])
        return starts_to_lengths(self._mark(ids)).tolist()
