"""Activation checkpointing and compile change memory and speed, not the losses."""

from typing import Any

import pytest
import torch

from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import RowShape
from blt_titan.loss import ByteCrossEntropy
from blt_titan.model.blt import BLT
from blt_titan.model.flavors import BLT_FLAVORS
from blt_titan.titan import ActivationCheckpoint
from parallelisms.activation_checkpointing import checkpoint_global_blocks, checkpoint_local_blocks
from parallelisms.parallelize import apply_compile
from tests.helpers.distributed import run_distributed
from tests.helpers.saved_memory import LiveBytes
from tests.helpers.training_runs import losses, make_trainer, plain_name, train
from tests.helpers.word_rows import word_rows

pytestmark = pytest.mark.slow

COMPILED_LOSS_ATOL = 1e-4
"""Inductor fuses and reorders fp32 sums; over 4 steps of AdamW the losses differ by about 1e-6."""

LOCAL = "--local_blocks.activation_checkpoint=full"
CHECKPOINTING = {
    "none": [],
    "full": ["--activation_checkpoint.mode=full"],
    "selective_op": ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"],
    "selective_2": ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"],
    "local": [LOCAL],
    "full_and_local": ["--activation_checkpoint.mode=full", LOCAL],
}
SHAPE = RowShape(segments=2, segment_bytes=512, segment_patches=160)
COMPILED = ["--compile.enable"]
LAYOUTS = {
    1: {"one": []},
    2: {
        "cp2": ["--parallelism.context_parallel_degree=2"],
        "tp2": ["--parallelism.tensor_parallel_degree=2"],
        "pp2": ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"],
    },
}


def train_variants(out: str, overrides: list[str], layouts: dict[str, list[str]]) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters after 4 steps of this rank's stages, by layout and variant."""
    parameters = {}
    for layout, degrees in layouts.items():
        for name, variant in CHECKPOINTING.items():
            settings = [*overrides, *degrees, *variant, "--training.steps=4", "--checkpoint.no-enable"]
            trained = train(f"{out}/{layout}-{name}", *settings)
            parameters[f"{layout}-{name}"] = {plain_name(key): value for key, value in trained.items()}
    return parameters


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_activation_checkpointing_is_bit_identical(ranks, small_run, tmp_path):
    by_rank = run_distributed(train_variants, ranks, str(tmp_path), small_run, LAYOUTS[ranks], timeout_s=1000)
    for layout in LAYOUTS[ranks]:
        for name in CHECKPOINTING:
            assert losses(tmp_path / f"{layout}-{name}") == losses(tmp_path / f"{layout}-none"), name
            for trained in by_rank:
                reference = trained[f"{layout}-none"]
                assert trained[f"{layout}-{name}"].keys() == reference.keys()
                for key, value in reference.items():
                    assert torch.equal(trained[f"{layout}-{name}"][key], value), f"{layout}, {name}: {key}"


def saved_with(mode: str, option: str, local: bool) -> int:
    model: Any = BLT(BLT_FLAVORS["debug"])
    model.init_weights()
    if mode != "none":
        settings = ActivationCheckpoint(mode=mode, selective_ac_option=option)  # pyright: ignore[reportArgumentType]
        checkpoint_global_blocks(model, settings, compiled=False, dump_folder="")
    if local:
        checkpoint_local_blocks(model)
    batch = collate_rows(word_rows(2, SHAPE), SHAPE)
    loss_fn = ByteCrossEntropy()
    with loss_fn.step(1.0), LiveBytes() as live:
        loss = loss_fn(model(batch.ids_BS, batch.layout), batch.labels_BS)
    assert loss.requires_grad
    return live.total


def test_what_is_saved_for_backward_shrinks():
    saved = {
        "none": saved_with("none", "", False),
        "selective_op": saved_with("selective", "op", False),
        "selective_2": saved_with("selective", "2", False),
        "full": saved_with("full", "", False),
        "local": saved_with("none", "", True),
        "full_and_local": saved_with("full", "", True),
    }
    print("saved for backward, bytes:", {name: f"{n:,}" for name, n in saved.items()})
    assert saved["full"] < saved["selective_op"] < saved["none"]
    assert saved["full"] < saved["selective_2"] < saved["none"]
    # The local models are most of the debug model's activations.
    assert saved["full_and_local"] < saved["local"] < saved["full"]
    assert saved["full_and_local"] < saved["none"] / 2


def test_cross_attention_is_inside_what_is_checkpointed():
    model: Any = BLT(BLT_FLAVORS["debug"])
    checkpoint_local_blocks(model)
    wrapped = {name for name, module in model.named_modules() if type(module).__name__ == "CheckpointWrapper"}
    assert wrapped == {
        "encoder.layers.0",
        "encoder.cross_attention.0",
        "decoder.layers.0",
        "decoder.layers.1",
        "decoder.cross_attention.0",
        "decoder.cross_attention.1",
    }


def test_no_compiled_graph_has_symbolic_inputs():
    """Local and global blocks share a code object; what differs between them must not become a symbol."""
    graphs = []

    def look(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = [size for x in values for size in (x.shape if isinstance(x, torch.Tensor) else [x])]
        graphs.append([size for size in sizes if isinstance(size, torch.SymInt)])
        return graph

    torch._dynamo.reset()
    model: Any = BLT(BLT_FLAVORS["debug"])
    model.init_weights()
    apply_compile(model, backend=look)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        for shape, training in ((SHAPE, True), (RowShape(1, 512, 160), False)):
            batch = collate_rows(word_rows(1, shape), shape)
            with torch.set_grad_enabled(training):
                logits = model(batch.ids_BS, batch.layout)
            if training:
                logits.sum().backward()
    torch._dynamo.reset()
    assert graphs == [[]] * 10, (
        "hashes, local, encoder's and decoder's cross-attention, global; in training, in validation"
    )


COMPILE_VARIANTS = {
    1: {
        "compile": COMPILED,
        "compile_full": [*COMPILED, *CHECKPOINTING["full"]],
        "compile_selective_op": [*COMPILED, *CHECKPOINTING["selective_op"]],
    },
    2: {
        "compile_fsdp2": [*COMPILED, "--parallelism.data_parallel_shard_degree=2"],
        "compile_fsdp2_full": [*COMPILED, "--parallelism.data_parallel_shard_degree=2", *CHECKPOINTING["full"], LOCAL],
        "compile_cp2": [*COMPILED, "--parallelism.context_parallel_degree=2"],
        "compile_tp2": [*COMPILED, *LAYOUTS[2]["tp2"], *CHECKPOINTING["selective_op"], LOCAL],
        "compile_pp2": [*COMPILED, *LAYOUTS[2]["pp2"]],
    },
}


def train_compiled(out: str, overrides: list[str], variants: dict[str, list[str]]) -> dict[str, tuple[int, int, int]]:
    """Graphs compiled after 2 and after 4 steps, and graph breaks."""
    import torch._dynamo.utils

    counts = {}
    for name, variant in variants.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make_trainer(f"{out}/{name}", *overrides, *variant, "--training.steps=4", "--checkpoint.no-enable")
        batches = trainer.batch_generator(trainer.dataloader)
        graphs = []
        for step in range(1, 5):
            trainer.step = step
            trainer.train_step(batches)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        counts[name] = (graphs[1], graphs[3], sum(torch._dynamo.utils.counters["graph_break"].values()))
        trainer.close()
    return counts


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_compiled_losses_agree_and_nothing_is_compiled_twice(ranks, small_run, tmp_path):
    variants = COMPILE_VARIANTS[ranks]
    reference = [*small_run, "--training.steps=4", "--checkpoint.no-enable"]
    run_distributed(train, 1, str(tmp_path / "none"), *reference)
    by_rank = run_distributed(train_compiled, ranks, str(tmp_path), small_run, variants, timeout_s=1000)
    expected = losses(tmp_path / "none")
    for name in variants:
        for rank in by_rank:
            early, late, breaks = rank[name]
            assert early > 0, "nothing was compiled"
            assert late == early, f"{name}: {late - early} graphs compiled after the second step"
            assert breaks == 0
        got = losses(tmp_path / name)
        assert got.keys() == expected.keys()
        for step, loss in expected.items():
            assert abs(got[step] - loss) <= COMPILED_LOSS_ATOL, f"{name}, step {step}"
