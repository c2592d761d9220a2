"""A directory or a repository of released weights: what is in it, of either layout."""

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.hf.config import (
    BESIDE,
    HFConfigError,
    blt_args_from_hf,
    entropy_args_from_hf,
    own_fields,
    rule_from_hf,
)
from blt_titan.hf.export import Weights, fingerprints_of
from blt_titan.hf.names import PATCHER_PREFIX, blt_name_to_hf, entropy_name_to_hf
from blt_titan.hf.original import (
    HASH_TABLE,
    blt_args_from_original,
    blt_name_to_original,
    entropy_args_from_original,
    is_original,
    rule_from_original,
)
from blt_titan.hf.tensors import ModuleTensors
from blt_titan.hf.weight_files import WeightFiles, fill, matched_parameters, read_config
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rule import PatchRule

_HUB_FILES = ["*.json", "*.safetensors", "*.pth", "entropy_model/*"]


class Pretrained:
    """A directory or a repository of released weights, of either layout.

    Args:
        path: a directory, or the name of a repository on the hub.
        revision: of the repository.

    Raises:
        FileNotFoundError: naming what is not there.
    """

    def __init__(self, path: str | os.PathLike[str], *, revision: str | None = None):
        self.directory = _fetch(path, revision)
        entropy = self.directory / "entropy_model"
        self._params_at = next((p for p in (self.directory, entropy) if (p / "params.json").is_file()), None)
        self._config = read_config(self.directory / "config.json", optional=self._params_at is not None)
        self._original = is_original(self._config) or (not self._config and self._params_at is not None)

    @cached_property
    def _tensors(self) -> "WeightFiles":
        return WeightFiles(self.directory)

    @cached_property
    def _entropy_tensors(self) -> "WeightFiles":
        if not self._original:
            return self._tensors
        if self._params_at is None:
            raise FileNotFoundError(f"{self.directory}/entropy_model/params.json not found: it has no entropy model")
        return WeightFiles(self._params_at)

    @cached_property
    def blt_args(self) -> BLTArgs:
        """The shape of the BLT.

        Raises:
            HFConfigError: there is none, or our model cannot compute it.
        """
        if not self._config:
            raise HFConfigError(f"{self.directory}: holds an entropy model alone, no BLT")
        if self._original:
            return blt_args_from_original(self._config, self._tensors.shapes)
        return blt_args_from_hf(self._config)

    @property
    def has_entropy_model(self) -> bool:
        """Whether there is an entropy model too."""
        if self._original:
            return self._params_at is not None
        return any(name.startswith(PATCHER_PREFIX) for name in self._tensors.shapes)

    @property
    def entropy_directory(self) -> Path | None:
        """Where its entropy model lies: here, or in a folder beside the weights; None if there is none."""
        if self.has_entropy_model:
            return self.directory
        beside = self.directory / BESIDE
        return beside if (beside / "config.json").is_file() else None

    @cached_property
    def entropy_args(self) -> EntropyModelArgs:
        """The shape of the entropy model.

        Raises:
            HFConfigError: our model cannot compute it.
            ValueError: there is none.
        """
        if not self.has_entropy_model:
            raise ValueError(f"{self.directory} holds no entropy model: no tensor begins with {PATCHER_PREFIX}")
        if self._original:
            return entropy_args_from_original(self._params, self._entropy_tensors.shapes)
        forgets = own_fields(self._config)["reset_at_newline"]
        return replace(entropy_args_from_hf(self._config), reset_at_newline=forgets)

    @property
    def rule(self) -> PatchRule | None:
        """Where patches begin; None if it does not say."""
        if self._original:
            return rule_from_original(self._params) if self._params_at else None
        return rule_from_hf(self._config)

    @property
    def entropies(self) -> str:
        """The fingerprint of the entropy model that its training text was cut with; empty if it does not say."""
        return own_fields(self._config)["entropies"]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the entropy model that cuts its texts: in training, else of the export; empty if unknown."""
        return self.entropies or own_fields(self._config)["entropy_model"]

    def check_entropy_model(self, model: EntropyModel) -> None:
        """Check that the entropy model inside is still the one that was exported, if the configuration says which.

        Raises:
            CheckpointError: it is another one.
        """
        if (recorded := self.fingerprint) and recorded not in fingerprints_of(
            Weights(model.args, ModuleTensors(model))
        ):
            raise CheckpointError(
                f"{self.directory}: its entropy model is not the one that was exported, as after a save in bfloat16 by "
                "transformers, and would cut texts otherwise; name the original (--entropy-checkpoint) or export anew "
                "(another --threshold than in training, or allow_changed=True, says that other patches are meant)"
            )

    @property
    def _params(self) -> dict[str, Any]:
        assert self._params_at is not None
        return read_config(self._params_at / "params.json")

    @property
    def dtype(self) -> str:
        """Type of the weights, as the configuration says it; a name of torch's."""
        name = self._config.get("dtype") or self._config.get("torch_dtype") or "float32"
        if not isinstance(name, str) or not isinstance(getattr(torch, name, None), torch.dtype):
            raise HFConfigError(f"config.json: dtype = {str(name)[:100]!r}, must be a type of torch's, as bfloat16")
        return name

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by the name that it has there."""
        return self._tensors.get(name)

    def fill_blt(self, model: nn.Module) -> None:
        """Set the parameters of a BLT, which may be on the meta device.

        Raises:
            ValueError: naming tensors that are missing, left over or of another shape.
        """
        tensors = self._tensors
        names = [name for name in tensors.shapes if not name.startswith(PATCHER_PREFIX)]
        if not self._original:
            fill(model, matched_parameters(model, blt_name_to_hf, tensors, names), tensors)
            return
        hashed = sorted((name for name in names if HASH_TABLE.match(name)), key=lambda n: int(n.split(".")[1]))
        others = [name for name in names if name not in hashed]
        matched = matched_parameters(model, blt_name_to_original, tensors, others, but_for="hash_embedding.weight")
        table = model.get_parameter("hash_embedding.weight")
        rows = self.blt_args.hash_rows
        shapes = [tensors.shapes[name] for name in hashed]
        if shapes != [(rows, table.shape[1])] * (len(table) // rows):
            raise ValueError(
                f"{self.directory}: hash tables encoder_hash_tok_embedding.N.weight of shapes {shapes}, config.json "
                f"makes them {len(table) // rows} of {(rows, table.shape[1])}"
            )
        fill(model, matched, tensors)
        table = model.get_parameter("hash_embedding.weight")
        for number, name in enumerate(hashed):
            table.data[number * rows : (number + 1) * rows] = tensors.get(name)

    def fill_entropy_model(self, model: nn.Module) -> None:
        """Set the parameters of an entropy model, which may be on the meta device.

        Raises:
            ValueError: naming tensors that are missing, left over or of another shape.
        """
        tensors = self._entropy_tensors
        if self._original:
            matched = matched_parameters(model, lambda name: name, tensors, tensors.shapes)
        else:
            names = [name for name in tensors.shapes if name.startswith(PATCHER_PREFIX)]
            matched = matched_parameters(model, entropy_name_to_hf, tensors, names)
        fill(model, matched, tensors)


def _fetch(path: str | os.PathLike[str], revision: str | None) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory
    name = str(path)
    if directory.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise FileNotFoundError(f"{path}: no such directory, and not the name of a repository (owner/name)")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(f"{path}: no such directory, and the hub does not give it: {reason}") from error
