"""One rank of a run that only reads: rows are hashed and logged, the loader's state is saved as a trainer saves it.

    python -m tests.helpers.elastic_rank RANK WORLD_SIZE PORT FOLDER DATA WORKERS STEPS

Goes on from the last complete checkpoint in FOLDER, ends at step STEPS. A step is one row of each stream.
"""

import hashlib
import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from blt_titan.checkpoint.find import latest_checkpoint
from blt_titan.training.loader import merge_positions
from tests.helpers.small_loader import loader_of, rows_of

STREAMS = 48
SAVE_EVERY = 3


def main(rank: int, world_size: int, port: int, folder: Path, data: Path, workers: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world_size)
    loader = loader_of(
        data,
        streams=STREAMS,
        dp_rank=rank,
        dp_size=world_size,
        rows_per_batch=1,
        num_workers=workers,
        merge_positions=merge_positions,
    )
    step = 0
    try:
        checkpoint = latest_checkpoint(folder)
    except FileNotFoundError:
        pass
    else:
        state = {"dataloader": loader.state_dict()}
        dcp.load(state, checkpoint_id=str(checkpoint))
        loader.load_state_dict(state["dataloader"])
        step = int(checkpoint.name[5:])
    batches = iter(loader)
    with (folder / f"{world_size}-{rank}.log").open("a") as log:
        while step < steps:
            for i, batch in enumerate(itertools.islice(batches, STREAMS // world_size)):
                [row] = rows_of([batch])
                number = step * STREAMS + i * world_size + rank
                print(number, hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest(), file=log, flush=True)
            step += 1
            if step % SAVE_EVERY == 0 or step == steps:
                dcp.save({"dataloader": loader.state_dict()}, checkpoint_id=str(folder / f"step-{step}"))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank, world_size, port, folder, data, workers, steps = sys.argv[1:]
    main(int(rank), int(world_size), int(port), Path(folder), Path(data), int(workers), int(steps))
