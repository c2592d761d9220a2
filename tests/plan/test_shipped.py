"""The shipped configurations on the GPUs that they are for: each is built as one of its ranks, without data."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.slow
SHIPPED = [("blt_1b", 8), ("blt_8b", 8), ("blt_8b", 64), ("blt_8b_256", 256), ("blt_8b_1024", 1024)]
BUILD = """
import sys
from blt_titan.byte_vocab import VOCAB_SIZE
from blt_titan.commands.run_settings import config_file, run_arguments
from blt_titan.config.check import check_run, load_run_config
from blt_titan.config.rules.target import CARD
from blt_titan.dry_run import fake_cuda, step
from blt_titan.dry_run.memory import LiveBytes
from blt_titan.dry_run.watch import Watch
name, world_size, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = load_run_config(run_arguments(config_file(name), []))
check_run(config, world_size=world_size, verify_data=False, look_at_disk=False, target=CARD)
fake_cuda.let_meshes_be_real()
memory = LiveBytes(VOCAB_SIZE, "cpu")
watch = Watch([memory])
memory.watch = watch
place = step.take_place(config, world_size, rank)
with step.fake_mode():
    made = step.make_step(config, place, watch, memory, "cpu")
    held = sum(parameter.to_local().numel() for parameter in made.parameters())
    print("whole", sum(parameter.numel() for parameter in made.parameters()), "held", held)
"""


def built(name: str, world_size: int, rank: int) -> tuple[int, int]:
    """The parameters of the rank's stages, and those that it holds itself."""
    command = [sys.executable, "-c", BUILD, name, str(world_size), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    return int(words[words.index("whole") + 1]), int(words[words.index("held") + 1])


def test_each_is_built_where_it_is_for():
    ranks = [(name, size, rank) for name, size in SHIPPED for rank in ([0, 1023] if size == 1024 else [size - 1])]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(ranks, pool.map(lambda asked: built(*asked), ranks), strict=True))
    parameters = {"blt_1b": 4.53e9, "blt_8b": 10.57e9, "blt_8b_256": 10.57e9}
    for (name, size, _), (whole, held) in found.items():
        copies = {256: 2, 1024: 2}.get(size, 1)
        stages = 2 if size == 1024 else 1
        # What FSDP pads, and norms that every tensor-parallel rank holds.
        assert held * size / copies / stages == pytest.approx(whole, rel=0.02), name
        if name in parameters:
            assert whole == pytest.approx(parameters[name], rel=0.01)
    (first, _), (last, _) = (found["blt_8b_1024", 1024, rank] for rank in (0, 1023))
    assert first + last == pytest.approx(10.57e9, rel=0.01)
