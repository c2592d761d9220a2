"""A flipped bit is found, in any file, by whoever reads it and by who verifies; in every layout."""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from blt_titan.checkpoint import read
from blt_titan.checkpoint.digests import unsealed
from blt_titan.checkpoint.find import find_checkpoint, latest_checkpoint
from blt_titan.checkpoint.load import cannot_read, fill_state
from blt_titan.checkpoint.read import CheckpointError, DamagedError, SafeLoadPlanner, SafeReader
from blt_titan.checkpoint.storage_writer import DigestWriter
from blt_titan.checkpoint.verify import damage, damaged_weights, entries_of_files, faults
from blt_titan.checkpoint.write import write_checkpoint
from blt_titan.model.args import EntropyModelArgs
from blt_titan.model.entropy_model import EntropyModel
from tests.helpers.bits import flip
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE: dict[str, Any] = {
    "weight": torch.arange(3000.0),
    "optimizer": {"state": {"weight": {"exp_avg": torch.ones(3000)}}},
    "train_state": {"step": 7},
}


def saved(folder: Path) -> Path:
    save(STATE, storage_writer=DigestWriter(folder), no_dist=True)
    return folder


def all_faults(folder: Path) -> list[str]:
    return list(faults(folder, reads=lambda name: True))


def empty() -> dict[str, Any]:
    return {
        "weight": torch.zeros(3000),
        "optimizer": {"state": {"weight": {"exp_avg": torch.zeros(3000)}}},
        "train_state": {"step": 0},
    }


def test_what_is_sound_is_read_by_us_and_by_torch(tmp_path):
    folder = saved(tmp_path / "c")
    assert all_faults(folder) == []
    assert {path.name for path in folder.iterdir()} == {".metadata", "__0_0.distcp"}
    ours, theirs = empty(), empty()
    fill_state(ours, folder)
    load(theirs, checkpoint_id=str(folder), no_dist=True)
    for state in (ours, theirs):
        assert torch.equal(state["weight"], STATE["weight"])
        assert state["train_state"] == {"step": 7}


def test_every_byte_of_every_file_is_in_a_digest(tmp_path):
    folder = saved(tmp_path / "c")
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        # Each byte of the seal, and others throughout; ends of archives, names and numbers among them.
        for offset in sorted({*range(0, size, 127), *range(size - 45, size)}):
            with flip(file, offset):
                [fault] = all_faults(folder)
                assert fault.startswith(f"{file}: "), offset
                with pytest.raises(CheckpointError, match=file.name):
                    fill_state(empty(), folder)
    assert all_faults(folder) == []


def test_bytes_that_nobody_wrote_are_named(tmp_path):
    folder = saved(tmp_path / "c")
    file = folder / "__0_0.distcp"
    size = file.stat().st_size
    with open(file, "ab") as more:
        more.write(b"x")
    assert damage(folder) == f"{file}: has {size + 1} bytes, but {size} were written"


def test_entries_lie_back_to_back(tmp_path):
    """Else there would be bytes that no digest has."""
    [(name, entries)] = entries_of_files(SafeReader(saved(tmp_path / "c")).read_metadata()).items()
    end = 0
    for _, info in entries:
        assert info.offset == end
        end += info.length
    assert end == (tmp_path / "c" / name).stat().st_size


def test_what_is_not_read_is_not_compared(tmp_path):
    folder = saved(tmp_path / "step-7")
    [entries] = entries_of_files(SafeReader(folder).read_metadata()).values()
    places = dict(entries)
    momentum, step = places["optimizer.state.weight.exp_avg"], places["train_state.step"]
    with flip(folder / momentum.relative_path, momentum.offset + momentum.length // 2):
        # A look reads no tensor; who wants the weights alone does not read the optimizer.
        assert damage(folder) is None
        assert damaged_weights(folder) is None
        fill_state({"weight": torch.zeros(3000)}, folder)
        with pytest.raises(DamagedError, match=r"entry 'optimizer.state.weight.exp_avg', bytes .* its digest differs"):
            fill_state(empty(), folder)
    with flip(folder / step.relative_path, step.offset + step.length // 2):
        assert "entry 'train_state.step'" in str(damage(folder))  # what a start compares is small, and is read


def test_the_newest_whose_weights_are_sound_is_chosen(tmp_path, caplog):
    for step in (1, 2):
        saved(tmp_path / f"step-{step}")
    [entries] = entries_of_files(SafeReader(tmp_path / "step-2").read_metadata()).values()
    weight = dict(entries)["weight"]
    with flip(tmp_path / "step-2" / weight.relative_path, weight.offset + weight.length // 2):
        assert find_checkpoint(tmp_path).name == "step-1"
        assert "step-2 is passed over" in caplog.text
        assert latest_checkpoint(tmp_path).name == "step-2"  # by a look: a run compares as it loads
    assert find_checkpoint(tmp_path).name == "step-2"
    assert latest_checkpoint(tmp_path, before=2).name == "step-1"


def test_a_checkpoint_of_old_loads_and_says_once_that_it_has_no_digests(tmp_path, caplog):
    save(STATE, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        fill_state(empty(), tmp_path / "c")
    assert [record.message for record in caplog.records if record.name == read.__name__] == [
        f"{tmp_path / 'c'} was written without digests: a changed number in it would not be found"
    ]
    assert all_faults(tmp_path / "c") == []
    caplog.clear()
    read._say_undigested.cache_clear()
    fill_state(empty(), saved(tmp_path / "new"))
    assert not [record for record in caplog.records if record.name == read.__name__]


def test_digests_without_a_seal_are_damage(tmp_path):
    path = saved(tmp_path / "c") / ".metadata"
    pickled, is_sealed = unsealed(path.read_bytes())
    assert is_sealed
    path.write_bytes(pickled)
    assert damage(tmp_path / "c") == f"{path}: is damaged at its end, where its digest was; take another checkpoint"
    with pytest.raises(DamagedError):
        fill_state(empty(), tmp_path / "c")


def test_an_import_carries_digests(tmp_path):
    args = EntropyModelArgs(dim=32, n_heads=2, n_layers=1)
    model = EntropyModel(args)
    model.init_weights()
    folder = write_checkpoint(model, "blt_entropy", args, tmp_path / "imported")
    assert all_faults(folder) == []
    data = folder / "__0_0.distcp"
    with flip(data, data.stat().st_size // 2):
        assert len(all_faults(folder)) == 1


def test_the_writer_can_be_handed_to_another_process(tmp_path):
    writer = pickle.loads(pickle.dumps(DigestWriter(tmp_path / "c")))
    save(STATE, storage_writer=writer, no_dist=True)
    assert all_faults(tmp_path / "c") == []


WHOLE = torch.arange(60.0).reshape(12, 5)


def save_then_read_in_pieces(folder: str) -> list[Any]:
    """Write by all ranks, then read as other slices with one bit of the last rank's file flipped."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (ranks,))
    state = {"weight": distribute_tensor(WHOLE, mesh, [Shard(0)])}
    save(state, storage_writer=DigestWriter(folder))
    found: list[Any] = [all_faults(Path(folder)), len(list(Path(folder).glob("*.distcp")))]
    # Columns, of which each rank needs a slice of every file.
    columns = {"weight": distribute_tensor(torch.zeros_like(WHOLE), mesh, [Shard(1)])}
    load(columns, storage_reader=SafeReader(folder), planner=SafeLoadPlanner())
    weight: DTensor = columns["weight"]
    found.append(torch.equal(weight.full_tensor(), WHOLE))
    if rank == 0:
        file = Path(folder) / f"__{ranks - 1}_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    rows = {"weight": distribute_tensor(torch.zeros_like(WHOLE), mesh, [Shard(0)])}
    try:
        load(rows, storage_reader=SafeReader(folder), planner=SafeLoadPlanner())
    except BaseException as error:
        found.append(repr(cannot_read(folder, error)))
    return found


@pytest.mark.slow
def test_ranks_read_other_slices_and_all_hear_of_damage_to_one(tmp_path):
    for found in run_distributed(save_then_read_in_pieces, 2, str(tmp_path / "c")):
        assert found[:3] == [[], 2, True]
        assert re.match(r"DamagedError\(.*__1_0\.distcp: entry 'weight', bytes", found[3])
    [fault] = all_faults(tmp_path / "c")
    assert fault.startswith(f"{tmp_path / 'c'}/__1_0.distcp: entry 'weight'")
    with pytest.raises(DamagedError, match=r"__1_0\.distcp: entry 'weight'"):
        fill_state({"weight": torch.zeros(12, 5)}, tmp_path / "c")
