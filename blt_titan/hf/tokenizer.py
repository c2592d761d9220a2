"""Bytes as tokens: a tokenizer that needs nothing else, and the files from which `AutoTokenizer` makes the same.

    "é</s>"   ->   <s> C3 A9 3C 2F 73 3E   ->   1 199 173 64 51 119 66        what looks like `</s>` in a text is text

`transformers` ships no tokenizer class for BLT, so the files describe a BPE without merges over GPT-2's printable names
of the 256 bytes, byte b as id b + 4.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from blt_titan.byte_vocab import BOS_ID, BOUNDARY_ID, BYTE_OFFSET, EOS_ID, RESERVED_ID, bytes_to_ids

SPECIAL_TOKENS = {"<boe>": BOUNDARY_ID, "<s>": BOS_ID, "</s>": EOS_ID, "<pad>": RESERVED_ID}


class ByteTokenizer:
    """Text or bytes to ids and back; every byte sequence survives."""

    bos_id, eos_id, pad_id = BOS_ID, EOS_ID, RESERVED_ID

    def __call__(
        self,
        text: str | bytes | Sequence[str | bytes],
        *,
        padding: bool = False,
        return_tensors: Literal["pt", "np"] | None = None,
        add_bos: bool = True,
        add_eos: bool = False,
    ) -> dict[str, Any]:
        """Return ids and which of them are real, as tokenizers of `transformers` do.

        >>> ByteTokenizer()(["hé", "a"], padding=True)
        {'input_ids': [[1, 108, 199, 173], [1, 101, 3, 3]], 'attention_mask': [[1, 1, 1, 1], [1, 1, 0, 0]]}

        Args:
            text: one, or several.
            padding: add `pad_id` on the right up to the longest.
            return_tensors: `pt` for torch, `np` for NumPy: int64 [B, S], also of one text; None for lists.
            add_bos: put BOS before each text.
            add_eos: put EOS after it.

        Returns:
            `input_ids` and `attention_mask`, 1 where an id is real.

        Raises:
            ValueError: tensors of texts of different lengths without padding; or `return_tensors` is neither.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors = {return_tensors!r}: must be 'pt', 'np' or None")
        one = isinstance(text, str | bytes)
        rows = [self.encode(content, add_bos=add_bos, add_eos=add_eos) for content in ([text] if one else text)]
        lengths = [len(ids) for ids in rows]
        slots = [max(lengths, default=0) if padding else length for length in lengths]
        if return_tensors is not None and len(set(slots)) > 1:
            raise ValueError(f"texts of {min(lengths)} to {max(lengths)} ids make no tensor: pass padding=True")
        found: dict[str, Any] = {
            "input_ids": [ids + [self.pad_id] * (n - len(ids)) for ids, n in zip(rows, slots, strict=True)],
            "attention_mask": [[1] * length + [0] * (n - length) for length, n in zip(lengths, slots, strict=True)],
        }
        if return_tensors is not None:
            arrays = {name: np.array(lists, np.int64).reshape(len(rows), -1) for name, lists in found.items()}
            return arrays if return_tensors == "np" else {name: _as_torch(array) for name, array in arrays.items()}
        return {name: lists[0] for name, lists in found.items()} if one else found

    def encode(self, text: str | bytes, *, add_bos: bool = True, add_eos: bool = False) -> list[int]:
        """Return ids.

        >>> ByteTokenizer().encode("hé")
        [1, 108, 199, 173]
        """
        content = text.encode() if isinstance(text, str) else text
        return [BOS_ID] * add_bos + bytes_to_ids(content).tolist() + [EOS_ID] * add_eos

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes among ids; special ones are left out."""
        return bytes(int(i) - BYTE_OFFSET for i in ids if i >= BYTE_OFFSET)

    def decode(self, ids: Iterable[int]) -> str:
        """Return text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def batch_decode(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Return the text of each row, as `decode` does."""
        return [self.decode(ids) for ids in rows]


def _as_torch(array: np.ndarray) -> Any:
    import torch  # here: a tokenizer alone needs none of it

    return torch.from_numpy(array)


def printable_bytes() -> list[str]:
    """Return GPT-2's name of each byte: itself where Latin-1 prints it, else the next character from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def tokenizer_files(max_length: int) -> dict[str, dict[str, Any]]:
    """Return the contents of `tokenizer.json` and `tokenizer_config.json`.

    Args:
        max_length: ids that the model takes.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for content, number in SPECIAL_TOKENS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS_ID], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": SPECIAL_TOKENS | {name: b + BYTE_OFFSET for b, name in enumerate(printable_bytes())},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        # So that a text that spells a special token stays text.
        "split_special_tokens": True,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
