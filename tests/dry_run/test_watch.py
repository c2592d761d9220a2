"""What the observers of a dry run see, on "cuda" tensors without data; any build of torch runs this."""

import pytest
import torch

from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import RowShape
from blt_titan.dry_run.cards import CARDS
from blt_titan.dry_run.host_reads import HostReads
from blt_titan.dry_run.memory import LiveBytes
from blt_titan.dry_run.watch import Watch
from blt_titan.model.attention import causal_mask, window_mask
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.small_models import small_blt
from tests.helpers.word_rows import word_rows

VOCAB = 260
SHAPE = RowShape(segments=2, segment_bytes=96, segment_patches=32)


def watching(*observers) -> Watch:
    watch = Watch(observers)
    for observer in observers:
        observer.watch = watch
    return watch


@pytest.fixture
def reads():
    return HostReads()


@pytest.fixture
def device(tmp_path_factory):
    with fake_cuda(tmp_path_factory.mktemp("guard")) as mode:
        yield mode


READS = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x[0] > 0),
    "in a list": lambda x: x[:1].tolist(),
    "to the host": lambda x: x.cpu(),
    "waited-for copy": lambda x: torch.zeros(3).to("cuda"),
    "copied into": lambda x: torch.zeros(100).copy_(x),
}
SILENT = {
    "arithmetic": lambda x: (x + x).cumsum(0),
    "asynchronous copy": lambda x: torch.zeros(3).to("cuda", non_blocking=True),
    "index of a fixed shape": lambda x: x[torch.zeros(4, dtype=torch.int64, device="cuda")],
    "of the CPU": lambda x: torch.zeros(3).sum().item(),
}


@pytest.mark.parametrize("what", READS)
def test_host_reads_are_found_where_they_are(what, reads, device):
    x = torch.zeros(100, device="cuda")
    watch = watching(reads)
    with watch, watch.at(phase="forward"):
        READS[what](x)
    (found,) = reads.found()
    assert found.times == 1
    assert found.where.startswith("test_watch.py:")
    assert found.where.endswith("(forward)")


@pytest.mark.parametrize("what", SILENT)
def test_what_waits_for_nothing_is_no_host_read(what, reads, device):
    x = torch.zeros(100, device="cuda")
    watch = watching(reads)
    with watch, watch.at(phase="forward"):
        SILENT[what](x)
    assert reads.found() == []


def test_reads_before_a_step_do_not_count(reads, device):
    with watching(reads):
        torch.zeros(100, device="cuda").sum().item()
    assert reads.found() == []


def test_tensors_of_two_devices_are_refused(device):
    with pytest.raises(RuntimeError, match="cuda"):
        torch.zeros(100, device="cuda") + torch.zeros(100)


def test_live_bytes_are_those_of_storages(device):
    memory = LiveBytes(VOCAB)
    watch = watching(memory)
    with watch:
        with watch.at(phase="batch"):
            x = torch.zeros(1024, device="cuda")
        assert memory.now() == {"batch": 4096}
        with watch.at(phase="forward", part="encoder"):
            y = x[:512].view(2, 256)  # a view is no storage of its own
            z = y + 1  # 2,048 bytes
            odd = torch.zeros(3, device="cuda")  # 12 bytes take a block of 512
        assert memory.now() == {"batch": 4096, "activations: encoder": 2048 + 512}
        del z
        memory.name([odd], "gradients")
        assert memory.now() == {"batch": 4096, "gradients": 512}
    assert memory.peak == 4096 + 2048 + 512
    assert memory.peak_phase == "forward"
    del x
    assert memory.now() == {"batch": 4096, "gradients": 512}, "the view keeps the storage"
    del y
    assert memory.now() == {"gradients": 512}


def test_a_peak_is_that_of_the_time_since_it_was_forgotten(device):
    memory = LiveBytes(VOCAB)
    watch = watching(memory)
    with watch, watch.at(phase="forward"):
        x = torch.zeros(4096, device="cuda")
        del x
        memory.forget_peaks()
        y = torch.zeros(256, device="cuda")
    assert (memory.peak, y.shape[0]) == (1024, 256)


@pytest.fixture
def small():
    return small_blt(attention_backend="sdpa"), collate_rows(word_rows(2, SHAPE), SHAPE)


def test_a_forward_reads_nothing_and_stays_on_its_device(small, reads, device):
    model, batch = small
    model = model.to("cuda")
    memory = LiveBytes(VOCAB)
    watch = watching(reads, memory)
    watch.follow(model)
    batch = batch.map(lambda tensor: tensor.to("cuda"))
    with watch, watch.at(phase="forward"):
        logits = model(batch.ids_BS, batch.layout)
    assert logits.device.type == "cuda"
    assert reads.found() == []
    kinds = set(memory.at_peak)
    assert {"activations: encoder", "activations: blocks", "activations: decoder"} <= kinds


def test_masks_of_flex_attention_are_made_without_a_host_read(reads, device):
    doc_BS = torch.zeros(2, 1024, dtype=torch.int32, device="cuda")
    watch = watching(reads)
    with watch, watch.at(phase="forward"):
        window_mask(doc_BS, window=512, backend="flex")
        causal_mask(doc_BS, backend="flex")
    assert reads.found() == []


def test_cards_are_named_as_they_are_asked_for():
    assert [card.name for card in CARDS.values()] == list(CARDS)
    assert all(0 < card.bandwidth_share <= 1 and 0 < card.matmul_share <= 1 for card in CARDS.values())
