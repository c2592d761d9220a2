"""No graph of a compiled BLT has a symbol among its inputs; any build of torch runs this."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.backends.registry import register_backend

from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import RowShape
from blt_titan.dry_run.compiler import is_symbolic
from parallelisms.parallelize import apply_compile
from tests.helpers.small_models import small_blt, small_entropy_model
from tests.helpers.word_rows import word_rows

pytestmark = pytest.mark.slow
SHAPE = RowShape(segments=2, segment_bytes=96, segment_patches=32)
graphs: list[list[str]] = []


@register_backend(name="show_symbols")
def show_symbols(module: torch.fx.GraphModule, inputs):
    """Note the symbolic inputs of a graph, and run it as it is."""
    values = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    graphs.append([str(value) for value in values if is_symbolic(value)])
    return module


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    graphs.clear()
    yield
    torch._dynamo.reset()


def two_steps(model) -> None:
    batch = collate_rows(word_rows(2, SHAPE), SHAPE)
    for _ in range(2):
        model(batch.ids_BS, batch.layout).sum().backward()


@pytest.mark.parametrize("make", [small_blt, small_entropy_model])
def test_a_compiled_model_has_no_symbolic_inputs(make):
    model = make()
    apply_compile(model, backend="show_symbols")
    two_steps(model)
    assert graphs
    assert not any(graphs)


def test_symbols_would_be_seen():
    """What Dynamo does by itself with stacks of other sizes: the reason for `dynamic=False`."""
    model = small_blt()
    for stack in (model.layers, model.encoder.layers, model.decoder.layers):
        for block in stack.children():
            block.compile(backend="show_symbols", fullgraph=True)
    two_steps(model)
    assert any(graphs)
