"""Byte Latent Transformers (arXiv 2412.09871) trained on TorchTitan.

    from blt_titan import BLT, generate

    model = BLT.from_pretrained("outputs/demo", entropy_model="outputs/demo/entropy")
    print(generate(model, "def main"))

What is named here is imported when it is first used, so that `import blt_titan` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blt_titan.hf.pretrained import Patcher
    from blt_titan.hf.pretrained import PretrainedBLT as BLT
    from blt_titan.hf.pretrained import PretrainedEntropyModel as EntropyModel
    from blt_titan.hf.tokenizer import ByteTokenizer
    from blt_titan.inference.generate import generate

    __version__: str

_EXPORTS = {
    "BLT": ("blt_titan.hf.pretrained", "PretrainedBLT"),
    "EntropyModel": ("blt_titan.hf.pretrained", "PretrainedEntropyModel"),
    "Patcher": ("blt_titan.hf.pretrained", "Patcher"),
    "ByteTokenizer": ("blt_titan.hf.tokenizer", "ByteTokenizer"),
    "generate": ("blt_titan.inference.generate", "generate"),
}
"""Public name: the module that defines it, and its name in that module."""

__all__ = ["BLT", "ByteTokenizer", "EntropyModel", "Patcher", "__version__", "generate"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("blt_titan")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'blt_titan' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
