"""Peers: a forward and a backward of ours, of `transformers`, of a token Llama, and of matrix products alone.

A peer is built in a process of its own from a `PeerSpec`, and is then asked for steps. All models compute a mean
cross-entropy over the same targets (the Llama over tokens of its own) and all gradients; no optimizer is part of it.
"""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from blt_titan import BLT
from blt_titan.bench.rows import Work, draw_rows
from blt_titan.bench.shapes import LLAMA_TOKEN_BYTES, LLAMA_VOCAB, equal_llama, weight_products
from blt_titan.loss import ByteCrossEntropy
from blt_titan.model.args import BLTArgs

OURS = ("eager", "compiled")
"""This code, without and with torch.compile of its parts."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PeerSpec:
    """What a process builds."""

    name: str
    """One of `PEERS`."""
    args: BLTArgs
    work: Work
    device: str
    dtype: str = "float32"
    """Number format of the computation; weights are fp32."""
    threads: int = 1
    seed: int = 0
    gives_back: bool = False
    """Give the allocator's free memory back after each step, where several large processes would not fit."""


@dataclass
class Peer:
    """Something that makes steps."""

    step: Callable[[], float | torch.Tensor]
    """Make a forward and a backward; returns the loss, NaN where there is none."""
    release: Callable[[], None]
    """Let go of the gradients."""


def build(spec: PeerSpec) -> Peer:
    """Build a peer on its device."""
    return PEERS[spec.name](spec)


def _model(spec: PeerSpec) -> BLT:
    model = BLT(replace(spec.args, init_seed=spec.seed))
    with torch.no_grad():
        model.init_weights()
    return model


def _autocast(spec: PeerSpec) -> contextlib.AbstractContextManager[Any]:
    if spec.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(spec.device).type, DTYPES[spec.dtype])


def _of_model(spec: PeerSpec, model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Peer:
    def step() -> torch.Tensor:
        with _autocast(spec):
            loss = loss_of()
        loss.backward()
        return loss.detach()

    return Peer(step, lambda: model.zero_grad(set_to_none=True))


def _ours(spec: PeerSpec) -> Peer:
    model = _model(spec).train().to(spec.device)
    backend = "inductor" if spec.name == "compiled" else None
    if backend:
        from parallelisms.parallelize import apply_compile  # imports what the others do without

        apply_compile(model, backend=backend)
    batch = draw_rows(spec.work, seed=spec.seed).batch.to(spec.device)
    loss_fn, n_targets = ByteCrossEntropy(backend), float(spec.work.total_bytes)

    def loss_of() -> torch.Tensor:
        with loss_fn.step(n_targets):
            return loss_fn(model(batch.ids_BS, batch.layout), batch.labels_BS)

    return _of_model(spec, model, loss_of)


def _transformers(spec: PeerSpec) -> Peer:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        _model(spec).save_pretrained(folder)
        transformers.utils.logging.disable_progress_bar()
        read: Any = transformers.BltForCausalLM.from_pretrained
        model = read(folder, attn_implementation="sdpa").train().to(spec.device)
    drawn = draw_rows(spec.work, seed=spec.seed)
    ids_BS, labels_BS = (x.long().to(spec.device) for x in (drawn.batch.ids_BS, drawn.batch.labels_BS))
    patch_lengths_BP = drawn.patch_lengths_BP.to(spec.device)

    def loss_of() -> torch.Tensor:
        logits_BSV = model(ids_BS, patch_lengths=patch_lengths_BP, use_cache=False).logits
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten())

    return _of_model(spec, model, loss_of)


def _llama(spec: PeerSpec) -> Peer:
    import transformers

    shape, work = equal_llama(spec.args, spec.work), spec.work
    make_config: Any = transformers.LlamaConfig
    config = make_config(
        vocab_size=LLAMA_VOCAB,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(spec.seed)
    made: Any = transformers.LlamaForCausalLM(config)
    model = made.train().to(spec.device)
    draw = torch.Generator().manual_seed(spec.seed)
    n_tokens = max(2, round(work.n_bytes / LLAMA_TOKEN_BYTES))
    ids = torch.randint(LLAMA_VOCAB, (work.rows, n_tokens + 1), generator=draw).to(spec.device)

    def loss_of() -> torch.Tensor:
        logits = model(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return _of_model(spec, model, loss_of)


def _products(spec: PeerSpec) -> Peer:
    products = weight_products(spec.args, spec.work)
    dtype = DTYPES[spec.dtype]

    @cache  # products of equal shapes share their tensors
    def of(rows: int, columns: int, use: str = "input") -> torch.Tensor:
        return torch.randn(rows, columns, device=spec.device, dtype=dtype)

    @torch.no_grad()
    def step() -> float:
        for p in products:
            x_MK, w_NK, g_MN = of(p.m, p.k), of(p.n, p.k), of(p.m, p.n)
            for _ in range(p.times):
                torch.mm(x_MK, w_NK.t(), out=of(p.m, p.n, "output"))
                torch.mm(g_MN, w_NK, out=of(p.m, p.k, "gradient"))
                torch.mm(g_MN.t(), x_MK, out=of(p.n, p.k, "gradient"))
        return float("nan")

    return Peer(step, lambda: None)


PEERS: dict[str, Callable[[PeerSpec], Peer]] = {
    "transformers": _transformers,
    "eager": _ours,
    "compiled": _ours,
    "llama": _llama,
    "floor": _products,
}
"""`transformers`: its BltForCausalLM with our weights. `llama`: see `shapes.equal_llama`. `floor`: the products with
weights alone, forward and backward, without anything between them."""
