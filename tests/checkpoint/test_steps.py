"""Step folders: which they are, and what becomes of later ones."""

from pathlib import Path

from blt_titan.checkpoint.steps import (
    complete_steps,
    is_complete,
    set_later_aside,
    step_folder,
    step_folders,
    step_of,
)


def make(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    return folder


def test_names_are_those_of_whole_numbers():
    assert step_of(step_folder("x", 12)) == 12
    for name in ("step-", "step-012", "step--1", "step-1.log", "step-١", ".step-1", "step-1 ", f"step-{'0' * 5000}"):
        assert step_of(Path(name)) is None, name


def test_steps_ascend_and_half_written_ones_are_not_complete(tmp_path):
    for step in (10, 9, 100):
        make(step_folder(tmp_path, step), ".metadata")
    make(step_folder(tmp_path, 11))
    make(step_folder(tmp_path, 12), ".metadata", "config.json")
    (tmp_path / "step-13").touch()
    assert list(step_folders(tmp_path)) == [9, 10, 11, 12, 100]
    assert list(complete_steps(tmp_path)) == [9, 10, 100]
    assert not is_complete(tmp_path / "step-12")
    assert step_folders(tmp_path / "none") == {}


def test_later_steps_are_set_aside_and_half_written_ones_removed(tmp_path):
    for step in (2, 4, 10):
        make(step_folder(tmp_path, step), ".metadata")
    make(step_folder(tmp_path, 12))
    set_later_aside(tmp_path, 2)
    assert list(step_folders(tmp_path)) == [2]
    [aside] = tmp_path.glob("abandoned-*")
    assert list(step_folders(aside)) == [4, 10]
    make(step_folder(tmp_path, 6), "config.json")
    set_later_aside(tmp_path, 6, is_kept=Path.is_dir)
    assert list(step_folders(tmp_path)) == [2, 6]
    set_later_aside(tmp_path, 5, is_kept=Path.is_dir)
    assert list(step_folders(tmp_path)) == [2]
