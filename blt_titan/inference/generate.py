"""Generate text with a trained BLT: prompts in, continuations out, whole or piece by piece.

    generate(model, "def main")                                      ->  "(arguments):\n    ..."
    generate(model, ["def ", "import "], max_bytes=64, seed=7)       ->  ["read(", "os\n"]
    for piece in generate(model, "def main", stream=True): ...       ->  "(", "a", "r", ...

Prompts are read `batch_size` at a time, and row r draws from a generator seeded seed + r, so what a prompt is continued
by does not depend on its neighbours: it is what `blt-titan generate` says for the same seed. Models are only read.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.likelihood import CONTEXT_BYTES
from blt_titan.inference.sample import Sampling, TextStream, sample_steps
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rule import PatchRule

PromptT = TypeVar("PromptT", str, bytes)
ModelT = TypeVar("ModelT", BLT, EntropyModel)

TEMPERATURE, MAX_BYTES, BATCH_SIZE = 0.8, 256, 16


class Options(TypedDict, total=False):
    """What `generate` takes beside model, prompts and `stream`; it says what each means."""

    max_bytes: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    rule: PatchRule | None
    entropy_model: EntropyModel | None
    batch_size: int
    context_bytes: int


@overload
def generate(
    model: BLT, prompts: PromptT, *, stream: Literal[False] = False, **options: Unpack[Options]
) -> PromptT: ...
@overload
def generate(
    model: BLT, prompts: Sequence[PromptT], *, stream: Literal[False] = False, **options: Unpack[Options]
) -> list[PromptT]: ...
@overload
def generate(
    model: BLT, prompts: PromptT, *, stream: Literal[True], **options: Unpack[Options]
) -> Iterator[PromptT]: ...
@overload
def generate(
    model: BLT, prompts: Sequence[PromptT], *, stream: Literal[True], **options: Unpack[Options]
) -> Iterator[list[PromptT]]: ...
def generate(
    model: BLT,
    prompts: Any,
    *,
    max_bytes: int = MAX_BYTES,
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: bool = False,
    rule: PatchRule | None = None,
    entropy_model: EntropyModel | None = None,
    batch_size: int = BATCH_SIZE,
    context_bytes: int = CONTEXT_BYTES,
) -> Any:
    """Continue prompts, each until the model ends the document or `max_bytes`.

    Args:
        model: a BLT, in the dtype and on the device to compute with. One that `BLT.from_pretrained` gave knows its rule
            and its entropy model.
        prompts: one, or several; text or bytes.
        max_bytes: bytes to sample at most, for each.
        temperature: what logits are divided by; 0 takes the likeliest byte.
        top_k: choose among so many of the likeliest bytes; None for all.
        top_p: choose among the likeliest bytes that together have this probability; None for all.
        seed: what samples are drawn from; row r draws from seed + r.
        stream: give pieces as they come.
        rule: where patches begin; default the model's.
        entropy_model: for a rule that needs entropies, on the model's device; default the model's.
        batch_size: prompts that are continued at once. With `stream` all are.
        context_bytes: of a longer prompt, the last so many bytes are read.

    Returns:
        The continuation, without the prompt, of the prompt's type (bytes that are no UTF-8 become U+FFFD in a text);
        of several prompts a list. With `stream` an iterator of pieces, which together are the same; of several prompts
        each is a list with a piece for every prompt, empty where nothing came.

    Raises:
        ValueError: a number is out of its range, the model does not say where patches begin, or the rule lacks its
            entropy model.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    for name, value in (("max_bytes", max_bytes), ("batch_size", batch_size), ("context_bytes", context_bytes)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    one = isinstance(prompts, str | bytes)
    asked: list[Any] = [prompts] if one else list(prompts)
    contents = [_as_bytes(prompt)[-context_bytes:] for prompt in asked]
    generator = _cached(model, rule, entropy_model)
    as_text = [isinstance(prompt, str) for prompt in asked]
    if stream:
        pieces = _stream(generator, contents, as_text, max_bytes, sampling)
        return (row[0] for row in pieces) if one else pieces
    made: list[Any] = []
    for first in range(0, len(contents), batch_size):
        batch = contents[first : first + batch_size]
        rows = [bytearray() for _ in batch]
        seeds = range(seed + first, seed + first + len(batch))
        for step in sample_steps(generator, batch, max_bytes=max_bytes, sampling=sampling, seeds=seeds):
            for row, byte in zip(rows, step, strict=True):
                if byte is not None:
                    row.append(byte)
        made += map(bytes, rows)
    made = [content.decode(errors="replace") if text else content for content, text in zip(made, as_text, strict=True)]
    return made[0] if one else made


def of_any_shape(model: ModelT) -> ModelT:
    """Return the same model, sharing all weights, that attends by SDPA: rows here have many shapes.

    FlexAttention would be compiled for each.
    """
    if model.args.attention_backend == "sdpa":
        return model
    view = copy.copy(model)
    view.args = replace(model.args, attention_backend="sdpa")  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return view


def _cached(model: Any, rule: PatchRule | None, entropy_model: EntropyModel | None) -> CachedBLT:
    rule = rule or getattr(model, "rule", None)
    if rule is None:
        raise ValueError("the model does not say where its patches begin: pass rule, such as PatchRule('space')")
    if rule.by_entropy and entropy_model is None:
        entropy_model = getattr(model, "entropy_model", None)
        if entropy_model is None:
            raise ValueError(
                f"patches begin by entropy (rule {rule.rule!r}), and the model comes without an entropy model: pass "
                "entropy_model, here or to from_pretrained"
            )
    return CachedBLT(of_any_shape(model), rule, None if entropy_model is None else of_any_shape(entropy_model))


def _stream(
    generator: CachedBLT, prompts: list[bytes], as_text: list[bool], max_bytes: int, sampling: Sampling
) -> Iterator[list[Any]]:
    if not prompts:
        return
    texts = [TextStream() if text else None for text in as_text]
    for step in sample_steps(generator, prompts, max_bytes=max_bytes, sampling=sampling):
        content = [b"" if byte is None else bytes([byte]) for byte in step]
        pieces = [c if text is None else text.feed(c) for c, text in zip(content, texts, strict=True)]
        if any(pieces):  # else the characters are not whole yet
            yield pieces
    if any(left := [b"" if text is None else text.end() for text in texts]):
        yield left


def _as_bytes(prompt: Any) -> bytes:
    if not isinstance(prompt, str | bytes):
        raise ValueError(f"prompts: holds {type(prompt).__name__}, expected text or bytes")
    return prompt.encode() if isinstance(prompt, str) else prompt
