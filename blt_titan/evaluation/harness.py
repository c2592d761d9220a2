"""EleutherAI's evaluation harness (`lm-eval`, an extra): a BLT as its model `blt_titan`.

A continuation is scored on the bytes of context and continuation in one pass: patches begin where the bytes so far say,
so that is exact, and no border between the two is special. What is longer than the model reads keeps its last bytes, as
if the document began there.

Limits of what is generated come in tokens, of which ours is a byte. A task means tokens of several bytes, so a limit is
taken times BYTES_PER_TOKEN; what ends at it is counted and said.
"""

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from blt_titan.byte_vocab import BOS_ID, bytes_to_ids
from blt_titan.evaluation.noise import NOISE_ON, NOISES, add_noise
from blt_titan.hf.load import load_for_inference
from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.likelihood import CONTEXT_BYTES, LikelihoodScorer
from blt_titan.inference.sample import Sampling, sample_steps
from blt_titan.progress import ProgressBar

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
MOST_TOKENS = 256
"""Generated where a task says no limit; the harness's own default."""


@register_model("blt_titan")
class BLTHarness(LM):
    """A BLT in the harness.

    Args:
        pretrained: a model directory, a checkpoint, or the name of a repository on the hub.
        entropy: the entropy model, where `pretrained` does not hold it.
        threshold: nats; where patches begin, default as in training.
        max_length: bytes that the model reads, BOS included.
        batch_size: prompts that are continued at once, "auto" for 8; likelihoods are batched by bytes.
        noise: change texts before, see `evaluation/noise.py`.
        noise_on: which texts: the paper averages over its results with "prompt", "completion" and "both".
        seed: of the noise and of sampling; every request draws on its own.
        device: default CUDA where it is there.
        dtype: of the BLT's computation, a name of torch's.
    """

    def __init__(
        self,
        pretrained: str,
        entropy: str | None = None,
        threshold: float | None = None,
        max_length: int = CONTEXT_BYTES,
        batch_size: int | str = 8,
        noise: str | None = None,
        noise_on: str = "prompt",
        seed: int = 0,
        device: str | None = None,
        dtype: str = "float32",
        **ignored: Any,
    ):
        super().__init__()
        if unknown := {key: value for key, value in ignored.items() if key != "max_batch_size"}:
            raise ValueError(f"blt_titan knows no model argument {', '.join(unknown)}")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._loaded = load_for_inference(
            pretrained,
            entropy=entropy,
            threshold=None if threshold is None else float(threshold),
            device=self._device,
            dtype=getattr(torch, dtype),
        )
        self._max_length = int(max_length)
        self._batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        if self._batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        if noise_on not in NOISE_ON:
            raise ValueError(f"noise_on = {noise_on!r}: must be one of {', '.join(NOISE_ON)}")
        if noise is not None and noise not in NOISES:
            raise ValueError(f"noise = {noise!r}: must be one of {', '.join(NOISES)}")
        self._noise, self._noise_on, self._seed = noise, noise_on, seed
        models = (self._loaded.model, self._loaded.rule, self._loaded.entropy_model)
        # One stride for rolling likelihoods: half the context is always there.
        self._scorer = LikelihoodScorer(*models, context_bytes=self._max_length)
        self._generator = CachedBLT(*models)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log p of each continuation given its context, and whether it is what greedy decoding gives.

        Raises:
            ValueError: a continuation is longer than the model reads.
        """
        pairs = [(self._prompt(request.args[0]), self._completion(*request.args)) for request in requests]
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self._max_length:
            raise ValueError(
                f"a continuation has {longest} bytes, the model reads the last {self._max_length} only: give a "
                "larger max_length (--max-length)"
            )
        ids = [self._last(context + continuation) for context, continuation in pairs]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for number, scored in self._scored(ids, disable_tqdm):
            n = len(pairs[number][1])
            nats = scored.nats[len(scored.nats) - n :].sum(dtype=np.float64)
            found[number] = (-float(nats), bool(scored.likeliest[len(scored.nats) - n :].all()))
            self.cache_hook.add_partial("loglikelihood", requests[number].args, found[number])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each text; long ones are read in windows, each byte once.

        The harness divides by the bytes of texts without noise. With noise, whatever `noise_on` says, log p is scaled
        by the bytes without over those with it, so that figures per byte are of the bytes that were read.
        """
        plain = [request.args[0].encode() for request in requests]
        texts = [self._noisy(text, text) for text in plain]
        ids = [_with_bos(text) for text in texts]
        found = [0.0] * len(requests)
        for number, scored in self._scored(ids, disable_tqdm):
            per_byte = float(scored.nats.sum(dtype=np.float64)) / len(texts[number])
            found[number] = -per_byte * len(plain[number])
            self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, found[number])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, greedily unless it says otherwise."""
        found, cut = [""] * len(requests), 0
        # Long ones together, and only those that are continued alike.
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -len(requests[i].args[0])))
        with ProgressBar(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for batch in _batches(order, [str(request.args[1]) for request in requests], self._batch_size):
                settings = normalize_gen_kwargs(dict(requests[batch[0]].args[1]), MOST_TOKENS)
                prompts = [self._prompt(requests[i].args[0]) for i in batch]
                for i, (content, whole) in zip(batch, self._generate(prompts, settings, batch), strict=True):
                    cut += not whole
                    found[i] = content.decode(errors="replace")
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                bar.update(len(batch))
        if cut:
            logger.warning(f"{cut} of {len(requests)} answers reached the limit of their bytes and were cut there")
        return found

    def _generate(
        self, prompts: Sequence[bytes], settings: Mapping[str, Any], numbers: Sequence[int]
    ) -> list[tuple[bytes, bool]]:
        """Return continuations, and of each whether it ended before the limit did."""
        stops = [stop.encode() for stop in settings["until"] if stop]
        max_bytes = BYTES_PER_TOKEN * int(settings["max_gen_toks"])
        if max_bytes + 1 >= self._max_length:
            raise ValueError(
                f"max_gen_toks = {settings['max_gen_toks']}, {max_bytes} bytes: leaves no room for a prompt in "
                f"{self._max_length} bytes; give a larger max_length (--max-length)"
            )
        sampling = Sampling(temperature=0.0)
        if settings.get("do_sample"):
            # 0 is "all" for others.
            top_k, top_p = settings.get("top_k") or None, settings.get("top_p") or None
            sampling = Sampling(float(settings["temperature"]), top_k, top_p)
        room = self._max_length - 1 - max_bytes
        made = [bytearray() for _ in prompts]
        stopped = [False] * len(prompts)
        steps = sample_steps(
            self._generator,
            [prompt[-room:] for prompt in prompts],
            max_bytes=max_bytes,
            sampling=sampling,
            seeds=[self._seed + number for number in numbers],
        )
        for step in steps:
            for row, byte in enumerate(step):
                if byte is None or stopped[row]:
                    stopped[row] = True
                    continue
                made[row].append(byte)
                stopped[row] = any(made[row].endswith(stop) for stop in stops)
            if all(stopped):
                break
        # A row that chose EOS is not stopped where all ended with it.
        return [
            (_before_stops(bytes(content), stops), end or len(content) < max_bytes)
            for content, end in zip(made, stopped, strict=True)
        ]

    def _scored(self, ids: Sequence[np.ndarray], disable_tqdm: bool) -> Iterator[Any]:
        with ProgressBar(total=len(ids), desc="scoring", disable=disable_tqdm) as bar:
            # BOS alone has no target: an empty text is certain.
            with_targets = [number for number, of_text in enumerate(ids) if len(of_text) > 1]
            bar.update(len(ids) - len(with_targets))
            for number, scored in self._scorer.score(ids[i] for i in with_targets):
                yield with_targets[number], scored
                bar.update()

    def _prompt(self, text: str) -> bytes:
        """Return a context's bytes, with the same noise for all continuations."""
        content = text.encode()
        return content if self._noise_on == "completion" else self._noisy(content, content)

    def _completion(self, context: str, text: str) -> bytes:
        """Return a continuation's bytes; after another context, the same text gets other noise."""
        content = text.encode()
        return content if self._noise_on == "prompt" else self._noisy(content, context.encode() + content)

    def _noisy(self, content: bytes, drawn_by: bytes) -> bytes:
        if self._noise is None:
            return content
        # Noise that leaves nothing would make an answer certain.
        return add_noise(content, self._noise, seed=self._seed + zlib.crc32(drawn_by)) or content

    def _last(self, content: bytes) -> np.ndarray:
        # The last byte is a target only.
        return _with_bos(content[-self._max_length :])


def _with_bos(content: bytes) -> np.ndarray:
    return np.concatenate([[BOS_ID], bytes_to_ids(content)])


def _before_stops(content: bytes, stops: Sequence[bytes]) -> bytes:
    places = [place for stop in stops if (place := content.find(stop)) >= 0]
    return content[: min(places)] if places else content


def _batches(order: Sequence[int], kinds: Sequence[str], size: int) -> Iterator[list[int]]:
    """Yield runs of one kind, of at most `size`."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or kinds[i] != kinds[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
