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
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from blt_titan.byte_vocab import BOS_ID, bytes_to_ids
from blt_titan.inference.entropies import EntropyScorer, mark_by_model
from blt_titan.interop.export import Weights, export_hf, install_files
from blt_titan.interop.hf_config import (
    OUR_KEY,
    HFConfigError,
    blt_args_from_hf,
    entropy_args_from_hf,
    entropy_config,
    rule_from_hf,
)
from blt_titan.interop.hf_names import PATCHER_PREFIX, blt_name_to_hf, entropy_name_to_hf
from blt_titan.interop.original import (
    HASH_TABLE,
    blt_args_from_original,
    blt_name_to_original,
    entropy_args_from_original,
    is_original,
    rule_from_original,
)
from blt_titan.interop.tensors import Entry, ModuleTensors, write_safetensors
from blt_titan.interop.tokenizer import ByteTokenizer
from blt_titan.model.blt import BLT as BareBLT
from blt_titan.model.entropy_model import EntropyModel as BareEntropyModel
from blt_titan.model.sizes import BLTArgs, EntropyModelArgs
from blt_titan.patching import starts_to_lengths
from blt_titan.patching.rule import PatchRule

__all__ = ["BLT", "ByteTokenizer", "EntropyModel", "Patcher", "Pretrained"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_HUB_FILES = ["*.json", "*.safetensors", "*.pth", "entropy_model/*"]
_PATCHER_ALONE = "blt_patcher"


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
        self._config = _read_json(self.directory / "config.json", optional=self._params_at is not None)
        self._original = is_original(self._config) or (not self._config and self._params_at is not None)

    @cached_property
    def _tensors(self) -> "_Files":
        return _Files(self.directory)

    @cached_property
    def _entropy_tensors(self) -> "_Files":
        if not self._original:
            return self._tensors
        if self._params_at is None:
            raise FileNotFoundError(f"{self.directory}/entropy_model/params.json not found: it has no entropy model")
        return _Files(self._params_at)

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
        return entropy_args_from_hf(self._config)

    @property
    def rule(self) -> PatchRule | None:
        """Where patches begin; None if it does not say."""
        if self._original:
            return rule_from_original(self._params) if self._params_at else None
        return rule_from_hf(self._config)

    @property
    def entropies(self) -> str:
        """The fingerprint of the entropy model that its training text was cut with; empty if it does not say."""
        return (self._config.get(OUR_KEY) or {}).get("entropies", "")

    @property
    def _params(self) -> dict[str, Any]:
        assert self._params_at is not None
        return _read_json(self._params_at / "params.json")

    @property
    def dtype(self) -> str:
        """Of the weights, as the configuration says; a name of torch's."""
        return str(self._config.get("dtype") or self._config.get("torch_dtype") or "float32")

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by the name that it has there."""
        return self._tensors.get(name)

    def fill_blt(self, model: nn.Module) -> None:
        """Set the parameters of a BLT.

        Raises:
            ValueError: naming tensors that are missing, left over or of another shape.
        """
        tensors = self._tensors
        names = [name for name in tensors.shapes if not name.startswith(PATCHER_PREFIX)]
        if not self._original:
            _fill(model, blt_name_to_hf, tensors, names)
            return
        hashed = sorted((name for name in names if HASH_TABLE.match(name)), key=lambda n: int(n.split(".")[1]))
        others = [name for name in names if name not in hashed]
        _fill(model, blt_name_to_original, tensors, others, but_for="hash_embedding.weight")
        table = model.get_parameter("hash_embedding.weight")
        rows = self.blt_args.hash_rows
        shapes = [tensors.shapes[name] for name in hashed]
        if shapes != [(rows, table.shape[1])] * (len(table) // rows):
            raise ValueError(
                f"{self.directory}: hash tables encoder_hash_tok_embedding.N.weight of shapes {shapes}, config.json "
                f"makes them {len(table) // rows} of {(rows, table.shape[1])}"
            )
        for number, name in enumerate(hashed):
            table.data[number * rows : (number + 1) * rows] = tensors.get(name)

    def fill_entropy_model(self, model: nn.Module) -> None:
        """Set the parameters of an entropy model.

        Raises:
            ValueError: naming tensors that are missing, left over or of another shape.
        """
        tensors = self._entropy_tensors
        if self._original:
            _fill(model, lambda name: name, tensors, tensors.shapes)
        else:
            names = [name for name in tensors.shapes if name.startswith(PATCHER_PREFIX)]
            _fill(model, entropy_name_to_hf, tensors, names)


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
        model = _empty(lambda: cls(pretrained.blt_args))
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
    def from_pretrained(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> "EntropyModel":
        """Load the entropy model of a BLT directory, or one that is alone; fp32 on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: naming the file that is not there.
            HFConfigError: if the configuration says what our model cannot compute.
            ValueError: there is none, or naming tensors that do not fit.
        """
        pretrained = Pretrained(path, revision=revision)
        model = _empty(lambda: cls(pretrained.entropy_args))
        pretrained.fill_entropy_model(model)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write it alone: the patcher's part of a `transformers` BLT. transformers itself has no class for that.

        Raises:
            HFConfigError: naming what the configuration cannot express.
        """
        config = {"model_type": _PATCHER_ALONE, "patcher_config": entropy_config(self.args)}
        tensors = ModuleTensors(self)
        entries = [
            Entry(entropy_name_to_hf(name), shape, lambda begin, end, name=name: tensors.rows(name, begin, end), dtype)
            for name, shape in tensors.shapes.items()
        ]
        folder = Path(directory).resolve()
        there = _read_json(folder / "config.json", optional=True)
        if there and there.get("model_type") != _PATCHER_ALONE:
            raise FileExistsError(f"{folder}: holds a model of another kind; choose another directory")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write_safetensors(temporary, entries, max_shard_bytes=2**62)
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            install_files(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


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
    def from_pretrained(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> "Patcher":
        """Load the entropy model and the rule of a BLT directory.

        Raises:
            ValueError: it has none, or as `EntropyModel.from_pretrained`.
        """
        pretrained = Pretrained(path, revision=revision)
        if pretrained.rule is None:
            raise ValueError(f"{pretrained.directory}: says no rule by which patches begin")
        model = EntropyModel.from_pretrained(pretrained.directory) if pretrained.rule.by_entropy else None
        return cls(model, pretrained.rule)

    def patch_lengths(self, text: str | bytes) -> list[int]:
        """Return the lengths of the patches of BOS and a text's bytes; their sum counts the next position too.

        These are what `transformers` takes as `patch_lengths`, and `BLT.logits`.
        """
        content = text.encode() if isinstance(text, str) else text
        ids = np.concatenate([[BOS_ID], bytes_to_ids(content)])
        return starts_to_lengths(self._mark(ids)).tolist()


class _Files:
    """The tensors of a directory: safetensors, one file or several with an index, or `consolidated*.pth`."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        self._pickled: dict[str, torch.Tensor] = {}
        if index.is_file():
            self._file_of = dict(_read_json(index).get("weight_map") or {})
            if not self._file_of:
                raise ValueError(f"{index}: has no weight_map; fetch it again")
        elif (path := directory / "model.safetensors").is_file() or (
            path := directory / "consolidated.safetensors"
        ).is_file():
            with _opened(path) as file:
                self._file_of = dict.fromkeys(file.keys(), path.name)
        elif pickled := sorted(directory.glob("consolidated*.pth")):
            if len(pickled) > 1:
                raise FileNotFoundError(f"{directory}: several files of weights, {[p.name for p in pickled]}")
            try:
                content = torch.load(pickled[0], map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"{pickled[0]}: cannot be read ({reason}); fetch it again") from error
            for key in ("model", "state_dict"):
                content = content.get(key, content)
            self._pickled = content
            self._file_of = dict.fromkeys(content, pickled[0].name)
        else:
            raise FileNotFoundError(
                f"{directory}: no weights: neither model.safetensors, nor an index of its parts, nor consolidated*.pth"
            )
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        files: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            files.setdefault(file, []).append(name)
        for file, names in files.items() if not self._pickled else ():
            if not (directory / file).is_file():
                raise FileNotFoundError(f"{directory / file} not found, which {index.name} names")
            with _opened(directory / file) as opened:
                there = set(opened.keys())
                if absent := sorted(set(names) - there):
                    raise ValueError(f"{directory / file}: missing tensors {absent}, which {index.name} puts there")
                self.shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}

    def get(self, name: str) -> torch.Tensor:
        if self._pickled:
            return self._pickled[name]
        with _opened(self.directory / self._file_of[name]) as file:
            return file.get_tensor(name)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error}); fetch it again") from error


def _fill(
    model: nn.Module, translate: Callable[[str], str], tensors: _Files, names: Iterable[str], but_for: str = ""
) -> None:
    expected = {translate(name): name for name, _ in model.named_parameters() if name != but_for}
    missing, left_over = sorted(expected.keys() - set(names)), sorted(set(names) - expected.keys())
    if missing or left_over:
        raise ValueError(f"{tensors.directory}: missing tensors {missing}, left over {left_over}")
    for their_name, name in expected.items():
        parameter, shape = model.get_parameter(name), tensors.shapes[their_name]
        if parameter.shape != shape:
            raise ValueError(
                f"{tensors.directory}: {their_name} is {shape}, the configuration makes it {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors.get(their_name))


def _empty(build: Callable[[], ModuleT]) -> ModuleT:
    with torch.device("meta"):
        model = build()
    return model.to_empty(device="cpu")


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


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if optional:
            return {}
        raise FileNotFoundError(f"{path} not found: not a model directory")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected an object")
    return dict(content)
