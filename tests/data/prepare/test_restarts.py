"""Whatever stops `prepare`, the same command goes on, and the result is that of an undisturbed run."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from blt_titan.data.prepare import passes
from blt_titan.data.prepare import sources as sources_module
from blt_titan.data.prepare.destination import LocalDestination
from blt_titan.data.prepare.work_folder import locked
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import MANIFEST_NAME
from tests.helpers.prepared import files, run, write_source


@pytest.fixture
def source(tmp_path) -> Path:
    return write_source(tmp_path / "source")


@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("then", ["the same", "another"])
def test_an_interruption_at_any_rename_changes_nothing(source, tmp_path, monkeypatch, overwriting, then):
    """Every step ends with a rename, so this stops behind each of them."""
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 100_000)
    replace = os.replace
    clean = tmp_path / "clean"
    seed = 1 if then == "the same" else 2
    run(source, clean, seed=seed)
    stopped_at, interrupted, calls = 0, True, 0

    def stopping(*args):
        nonlocal calls, interrupted
        if calls == stopped_at:
            interrupted = True
            raise KeyboardInterrupt
        calls += 1
        replace(*args)

    while interrupted:
        interrupted, calls = False, 0
        out = tmp_path / str(stopped_at)
        if overwriting:
            run(source, out)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping)
            try:
                run(source, out, seed=1, overwrite=overwriting)
            except KeyboardInterrupt:
                assert interrupted
        if interrupted or then == "the same":
            run(source, out, seed=seed, overwrite=overwriting)
            assert files(out) == files(clean), stopped_at
        stopped_at += 1
    assert stopped_at > 30


def test_what_is_done_is_not_done_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 25_000)
    read, calls = passes.read_unit, []

    def stopping(unit, report):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(unit.number)
        return read(unit, report)

    monkeypatch.setattr(passes, "read_unit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    units = tmp_path / "out" / ".prepare" / "units"
    times = {path: path.stat().st_mtime_ns for path in units.iterdir()}
    assert len(times) == 4 * 3
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    assert calls == [3, 4, 5]
    assert {path: path.stat().st_mtime_ns for path in times} == times


KILLED = """
import sys, blt_titan.data.prepare.sources as sources
sources.UNIT_BYTES = 1 << 20
from blt_titan.commands.prepare import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_and_repeats_nothing(tmp_path):
    """Killed with its workers in the midst, again and again, and started anew; until a run comes through."""
    (tmp_path / "killed.py").write_text(KILLED)
    settings = ["--source", "python-stdlib", "--validation-fraction", "0.05", "--shard-bytes", "2MB", "--no-progress"]

    def start(out: str, workers: int) -> subprocess.Popen:
        command = [sys.executable, str(tmp_path / "killed.py"), *settings, "--out", str(tmp_path / out)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        return subprocess.Popen([*command, "--workers", str(workers)], env=environment, stdout=subprocess.DEVNULL)

    def done() -> set[tuple[str, int]]:
        found = set()
        for path in (tmp_path / "out/.prepare").glob("*/*.done.json"):
            with suppress(FileNotFoundError):  # at the end the whole folder goes
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    assert start("clean", 1).wait() == 0
    rng = np.random.default_rng(0)
    kills, finished = 0, set()
    while True:
        process = start("out", int(rng.integers(1, 3)))
        enough = len(finished) + int(rng.integers(1, 12))
        while process.poll() is None and len(done()) < enough:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        assert finished <= done() or (tmp_path / "out" / MANIFEST_NAME).exists(), "what was done stays as it is"
        finished = done()
    print(f"{kills} kills")
    assert kills >= 2
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_one_run_at_a_time(source, tmp_path):
    with (
        locked(tmp_path / "out" / ".prepare"),
        pytest.raises(DataError, match="another process is preparing this data set"),
    ):
        run(source, tmp_path / "out")


def test_leftovers_of_another_run_are_removed(source, tmp_path):
    out, clean = tmp_path / "out", tmp_path / "clean"
    run(source, clean)
    (out / ".prepare" / "units").mkdir(parents=True)
    for name in ("plan.json", "units/00000.done.json", "units/00000.text.tmp"):
        (out / ".prepare" / name).write_bytes(b'{"digest": "of another run"}')
    (out / "manifest.json.installing.partial").write_bytes(b"half")
    run(source, out)
    assert files(out) == files(clean)


def test_a_full_disk_is_one_sentence_and_what_was_done_stays(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 25_000)
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left on device.*free some space.*goes on where it stopped"):
            run(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]
    assert [path.name for path in (tmp_path / "out/.prepare/units").glob("*.done.json")] == ["00000.done.json"]
    run(source, tmp_path / "out")
    run(source, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_a_worker_that_is_killed_is_one_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES", 25_000)
    monkeypatch.setattr(passes, "read_unit", die)
    with pytest.raises(DataError, match=r"a worker process was killed.*start again to go on"):
        run(source, tmp_path / "out", workers=2)


def die(unit, report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_else_is_in_the_working_directory_stays(source, tmp_path):
    (tmp_path / "work" / "sub").mkdir(parents=True)
    (tmp_path / "work" / "thesis.tex").write_bytes(b"mine")
    run(source, tmp_path / "out", work=tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["sub", "thesis.tex"]


def test_an_install_that_was_interrupted_is_not_taken_for_another(source, tmp_path, monkeypatch):
    """Killed while it moved files; then the target is removed, or another is named, with the same working directory."""
    replace = os.replace

    def stopping(path, target):
        if str(target).endswith("train-00001.arrow") and Path(target).parent.name == "out":
            raise KeyboardInterrupt
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", work=tmp_path / "work")
    assert (tmp_path / "out" / "train-00000.arrow").exists()
    run(source, tmp_path / "other", work=tmp_path / "work")
    run(source, tmp_path / "clean")
    assert files(tmp_path / "other") == files(tmp_path / "clean")
    (tmp_path / "out" / "train-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"out/train-00000\.arrow: was moved there by a run that was interrupted, "):
        run(source, tmp_path / "out", work=tmp_path / "work")


def test_what_was_replaced_goes_even_if_its_removal_was_interrupted(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(source, out)
    remove, calls = LocalDestination.remove, []

    def stopping(self, name):
        if name.endswith(".arrow"):
            calls.append(name)
            if len(calls) == 2:
                raise KeyboardInterrupt
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalDestination, "remove", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, shard_bytes=2**30, overwrite=True)
    assert (out / calls[1]).exists()
    assert (out / ".prepare").exists()
    assert run(source, out, shard_bytes=2**30).already_done
    run(source, tmp_path / "clean", shard_bytes=2**30)
    assert files(out) == files(tmp_path / "clean")


def test_a_working_directory_on_another_disk(source, tmp_path, monkeypatch):
    replace = os.replace

    def across(path, target):
        if Path(target).parent.name == "out" and Path(path).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(path, target)

    run(source, tmp_path / "clean")
    monkeypatch.setattr(os, "replace", across)
    run(source, tmp_path / "out", work=tmp_path / "work")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


SLOW = """
import time, blt_titan.data.prepare.work as work
read_extent = work.read_extent

def slow(*args, **options):
    time.sleep(0.05)
    yield from read_extent(*args, **options)

work.read_extent = slow
"""


@pytest.mark.slow
def test_ctrl_c_stops_workers_too(tmp_path):
    """The work would take 45 s; workers import the program, and are slow as well."""
    (tmp_path / "killed.py").write_text(SLOW + KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), "--source", "python-stdlib", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        # A shell's background jobs ignore it, and what they start does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("out/.prepare/units/*.done.json")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "blt-titan prepare: stopped; the same command goes on from here"
    assert "Traceback" not in said
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_an_interrupted_upload_goes_on(source, tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    run(source, tmp_path / "out")
    put, sent = type(fs).put_file, []

    def stopping(self, path, target, **options):
        if len(sent) == 3:
            raise ConnectionError("the network is gone")
        sent.append(target)
        put(self, path, target, **options)

    for seed in (1, 0):  # what another run sent is removed
        sent.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(fs), "put_file", stopping)
            with pytest.raises(DataError, match="the network is gone"):
                run(source, "memory://upload", work=tmp_path / "work", seed=seed)
    run(source, "memory://upload", work=tmp_path / "work")
    assert {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find("/upload")} == files(tmp_path / "out")


def test_a_file_size_limit_while_arrow_writes_is_reported(source, tmp_path):
    """The operating system refuses the write itself, inside Arrow, in a process of its own."""
    program = (
        "import resource, sys; from blt_titan.commands.prepare import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), "--no-progress"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "cannot be written (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]
