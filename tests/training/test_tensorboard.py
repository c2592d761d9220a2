"""TensorBoard's files read back as TensorBoard reads them."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blt_titan.training.tensorboard import Curves


def write(folder: Path, steps: range, value: float, *, after: int | None = None) -> None:
    curves = Curves(folder)
    if after is not None:
        curves.resume_at(after)
    for step in steps:
        curves.log({"bits_per_byte": value, "share/web": 0.5}, step)
    curves.close()


def read(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/bits_per_byte")]


def test_steps_that_are_made_again_and_a_new_run_hide_the_old_points(tmp_path):
    write(tmp_path, range(1, 9), 1.0)
    write(tmp_path, range(5, 8), 2.0, after=4)
    assert read(tmp_path) == [*((step, 1.0) for step in range(1, 5)), *((step, 2.0) for step in range(5, 8))]
    write(tmp_path, range(1, 3), 3.0)
    assert read(tmp_path) == [(1, 3.0), (2, 3.0)]
    assert len(list(tmp_path.iterdir())) == 3


def test_steps_that_are_made_again_after_a_rollback_hide_the_old_points(tmp_path):
    curves = Curves(tmp_path)
    for step in range(1, 11):
        curves.log({"bits_per_byte": 1.0}, step)
    curves.resume_at(5)
    for step in range(6, 9):
        curves.log({"bits_per_byte": 2.0}, step)
    curves.close()
    assert read(tmp_path) == [*((step, 1.0) for step in range(1, 6)), *((step, 2.0) for step in range(6, 9))]
