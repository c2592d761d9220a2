"""What a run that reads from an object store says of it in its metrics: two ranks, each with two workers."""

import fsspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blt_titan.data.store import object_store
from blt_titan.data.store.fetch_counts import counted
from tests.helpers.distributed import run_distributed
from tests.helpers.prepared import run, write_source
from tests.helpers.s3_server import s3_server
from tests.helpers.training_runs import make_trainer, metrics

pytestmark = pytest.mark.slow
pytest.importorskip("s3fs", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs the extra dev")

FIELDS = {"fetched_bytes": "fetched_bytes", "fetch_retries": "retries", "cache_evictions": "evictions"}


def _train(out: str, data: str, overrides: list[str]) -> dict[str, int]:
    """Train; return what this rank and its workers have fetched by the last line."""
    object_store.FIRST_PAUSE_S = 0.01
    trainer = make_trainer(out, *overrides, f"--training.dataset_path={data}")
    by_last_line = {}
    take = trainer.metrics_processor.take_fetched

    def taken():
        # Workers go on meanwhile: what is told is what is told at one moment.
        told = take()
        by_last_line.update({name: int(n) for name, n in zip(FIELDS, trainer.metrics_processor._fetched, strict=True)})
        return told

    trainer.metrics_processor.take_fetched = taken
    trainer.train()
    trainer.close()
    ended = counted()
    assert all(by_last_line[name] <= getattr(ended, field) for name, field in FIELDS.items())
    return by_last_line


def test_metrics_tell_what_ranks_and_workers_fetched(small_run, tmp_path):
    data = tmp_path / "data"
    run(write_source(tmp_path / "source"), data)
    few = ["--data.streams=4", "--training.steps=6", "--checkpoint.no-enable", "--metrics.enable-tensorboard"]
    remote = [f"--data.cache_dir={tmp_path}/cache", "--data.cache_bytes=8000", "--training.dataloader.num_workers=2"]
    with s3_server() as server:
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("bucket")
        for path in data.iterdir():
            fs.put_file(str(path), f"bucket/data/{path.name}")
        server.fail(every=5)
        overrides = [*small_run, *few, *remote]
        ranks = run_distributed(_train, 2, str(tmp_path / "remote"), "s3://bucket/data", overrides)
    lines = metrics(tmp_path / "remote")
    assert len(lines) == 6
    assert sum(line["fetched_bytes"] for line in lines[1:]) > 0, "workers fetch while there are steps"
    for name in FIELDS:
        assert all(type(line[name]) is int and line[name] >= 0 for line in lines)
        assert sum(line[name] for line in lines) == sum(rank[name] for rank in ranks) > 0, name
    run_distributed(_train_here, 1, str(tmp_path / "here"), str(data), [*small_run, *few])
    assert not any(FIELDS.keys() & line.keys() for line in metrics(tmp_path / "here"))
    curves = EventAccumulator(str(tmp_path / "remote/tb"), size_guidance={"scalars": 0}).Reload()
    for name in FIELDS:
        assert [event.value for event in curves.Scalars(f"store/{name}")] == [line[name] for line in lines]


def _train_here(out: str, data: str, overrides: list[str]) -> None:
    trainer = make_trainer(out, *overrides, f"--training.dataset_path={data}")
    trainer.train()
    trainer.close()
