"""Read and write a `transformers` BltForCausalLM directory: `config.json` and `model.safetensors`.

A directory may hold the entropy model too, as its patcher. `load_hf` leaves it there and `load_hf_entropy_model`
reads it; any other tensor that is missing or left over is an error, because `transformers` would fill it at random
with no more than a warning.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

from blt_titan.interop.hf_config import blt_args_from_hf, entropy_args_from_hf, hf_config
from blt_titan.interop.hf_names import PATCHER_PREFIX, blt_name_to_hf, entropy_name_to_hf
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_hf(directory: str | os.PathLike[str]) -> BLT:
    """Load a BLT from a `transformers` directory, fp32 on the CPU.

    Args:
        directory: holds `config.json` and `model.safetensors`.

    Raises:
        FileNotFoundError: naming the file that is not there.
        HFConfigError: if the configuration says what our model cannot compute.
        ValueError: naming tensors that are missing, left over or of another shape.
    """
    directory = Path(directory)
    model = _on_meta(lambda: BLT(blt_args_from_hf(_read_config(directory))))
    with _open_weights(directory) as weights:
        names = [name for name in weights.keys() if not name.startswith(PATCHER_PREFIX)]  # noqa: SIM118
        return _fill(model, blt_name_to_hf, weights, names, directory)


def load_hf_entropy_model(directory: str | os.PathLike[str]) -> EntropyModel:
    """Load the entropy model that a `transformers` directory holds as its patcher, fp32 on the CPU.

    Raises:
        FileNotFoundError: naming the file that is not there.
        HFConfigError: if the configuration says what our model cannot compute.
        ValueError: if the directory holds no patcher, or naming tensors that do not fit.
    """
    directory = Path(directory)
    with _open_weights(directory) as weights:
        names = [name for name in weights.keys() if name.startswith(PATCHER_PREFIX)]  # noqa: SIM118
        if not names:
            raise ValueError(f"{directory} holds no entropy model: no tensor begins with {PATCHER_PREFIX}")
        model = _on_meta(lambda: EntropyModel(entropy_args_from_hf(_read_config(directory))))
        return _fill(model, entropy_name_to_hf, weights, names, directory)


def save_hf(model: BLT, directory: str | os.PathLike[str], entropy_model: EntropyModel | None = None) -> None:
    """Write a BLT, and its entropy model if given, as a `transformers` directory in fp32.

    Without an entropy model the directory says `patch_in_forward: false`, and `transformers` needs explicit
    `patch_lengths`.

    Args:
        model: whole model on one device.
        directory: made if missing; `config.json` and `model.safetensors` in it are replaced.
        entropy_model: becomes the patcher.

    Raises:
        HFConfigError: naming what `transformers` cannot express.
    """
    config = hf_config(model.args, entropy_model.args if entropy_model is not None else None)
    tensors = {blt_name_to_hf(name): p for name, p in model.named_parameters()}
    if entropy_model is not None:
        tensors |= {entropy_name_to_hf(name): p for name, p in entropy_model.named_parameters()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _on_meta(build: Callable[[], ModuleT]) -> ModuleT:
    with torch.device("meta"):
        return build()


def _read_config(directory: Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: not a Hugging Face model directory")
    return json.loads(path.read_text())


def _open_weights(directory: Path):
    path = directory / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found (weights in several shards are not read yet)")
    return safe_open(path, framework="pt", device="cpu")


def _fill(model: ModuleT, translate: Callable[[str], str], weights, names: Iterable[str], directory: Path) -> ModuleT:
    expected = {translate(name): name for name, _ in model.named_parameters()}
    missing, left_over = sorted(expected.keys() - set(names)), sorted(set(names) - expected.keys())
    if missing or left_over:
        raise ValueError(f"{directory}/model.safetensors: missing tensors {missing}, left over {left_over}")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for hf_name, name in expected.items():
            parameter, tensor = model.get_parameter(name), weights.get_tensor(hf_name)
            if parameter.shape != tensor.shape:
                raise ValueError(
                    f"{directory}/model.safetensors: {hf_name} is {tuple(tensor.shape)}, config.json makes it "
                    f"{tuple(parameter.shape)}"
                )
            parameter.copy_(tensor.float())
    return model
