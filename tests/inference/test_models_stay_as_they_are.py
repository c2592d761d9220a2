"""Scoring, generating and verifying between two steps of training: the steps, and the models, are those without."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blt_titan.batch import IGNORE_LABEL
from blt_titan.byte_vocab import document_ids
from blt_titan.data.rows.packing import RowShape
from blt_titan.inference.cached import CachedBLT
from blt_titan.inference.likelihood import LikelihoodScorer
from blt_titan.inference.sample import sample_steps
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.entropies import EntropyScorer
from tests.helpers.small_models import (
    DOCUMENTS,
    batch_by_spaces,
    packed,
    small_blt,
    small_entropy_model,
    stack_rows,
)
from tests.helpers.transformers_order import in_transformers_order

RULE = PatchRule("global", threshold=4.0, max_patch_bytes=16)
SHAPE = RowShape(2, 60, 40)


def train_step(model, optimizer) -> torch.Tensor:
    ids, labels, layout = stack_rows([packed(DOCUMENTS[:2], SHAPE)], SHAPE)
    logits = model(ids, layout)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORE_LABEL)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def set_up(training: bool):
    """A BLT and an entropy model with their optimizers; one parameter of each is frozen, and one module has a hook."""
    models = [small_blt(), small_entropy_model()]
    for model in models:
        model.train(training)
        next(model.parameters()).requires_grad_(False)
        model.layers["0"].register_forward_hook(lambda module, args, output: None)
    return models, [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]


def score(blt, entropy_model) -> None:
    ids = np.concatenate([document_ids(document) for document in DOCUMENTS])
    assert np.isfinite(EntropyScorer(entropy_model, lanes=2, chunk=16).score(ids)).all()
    scorer = LikelihoodScorer(blt, RULE, entropy_model, context_bytes=32)
    assert len(list(scorer.score([document_ids(document).astype(np.int64) for document in DOCUMENTS]))) == 4


def generate_some(blt, entropy_model) -> None:
    generator = CachedBLT(blt, RULE, entropy_model)
    assert list(sample_steps(generator, [b"to be", b""], max_bytes=20))
    assert generator.global_steps


def generate_and_stop_amid(blt, entropy_model) -> None:
    next(sample_steps(CachedBLT(blt, RULE, entropy_model), [b"to be"], max_bytes=20))
    requests = [(number, document_ids(document)) for number, document in enumerate(DOCUMENTS * 4)]
    next(EntropyScorer(entropy_model, lanes=1, chunk=16).score_all(requests))


def compute_as_transformers_does(blt, entropy_model) -> None:
    [ids] = [torch.from_numpy(document_ids(DOCUMENTS[0]).astype(np.int64))]
    in_transformers_order(blt).logits(*batch_by_spaces([ids]))


BETWEEN = [score, generate_some, generate_and_stop_amid, compute_as_transformers_does]


def described(model) -> list:
    """Everything of the modules that is not a parameter's value."""
    return [
        (name, module.training, len(module._forward_hooks), sorted(vars(module)), getattr(module, "placement", None))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [BETWEEN, BETWEEN[::-1]], ids=["there", "back"])
def test_two_steps_are_the_same_whatever_is_done_between(order, training):
    (plain, plain_optimizers), (used, used_optimizers) = set_up(training), set_up(training)
    as_before = [described(model) for model in used]
    for step in range(2):
        for one, its_optimizer, other, others_optimizer in zip(
            plain, plain_optimizers, used, used_optimizers, strict=True
        ):
            assert torch.equal(train_step(one, its_optimizer), train_step(other, others_optimizer)), step
        for work in order:
            work(*used)
    assert [described(model) for model in used] == as_before
    for one, other in zip(plain, used, strict=True):
        for (name, parameter), expected in zip(other.named_parameters(), one.parameters(), strict=True):
            assert torch.equal(parameter, expected), name
