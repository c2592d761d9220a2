"""Hugging Face directories beside a run's checkpoints, without holding up the run.

A process of its own reads the checkpoint that is on disk and writes `<dump folder>/hf/step-N`, on the CPU, a block at a
time; the ranks gather nothing and go on. It works on hard links, made as soon as a checkpoint is complete, so that the
run may remove old ones before their turn comes. What a run that is killed leaves undone, the one that resumes it does.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from blt_titan.checkpoint.description import Description
from blt_titan.checkpoint.steps import complete_steps, is_complete, set_later_aside, step_folder
from blt_titan.custom_import import import_custom
from blt_titan.hf.export import export_hf, stored_weights

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_NICENESS = 10
_LINKS = ".checkpoints"


class ExportFailedError(RuntimeError):
    """A Hugging Face directory could not be written; the checkpoints are not concerned."""


class HFExports:
    """Exports of one run; for one of its ranks.

    Args:
        checkpoints: the folder of the run's `step-N`.
        out: the folder to write `step-N` directories in.
        description: of the model; a last checkpoint of weights alone does not say it.
        entropy_checkpoint: becomes the patcher.
        dtype: of the weights, a name of torch's.
        force: write models that need explicit `patch_lengths`, too.
        custom_import: the module that registers the run's patching rule, if it is not a built-in one; or empty.
    """

    def __init__(
        self,
        checkpoints: Path,
        out: Path,
        *,
        description: Description,
        entropy_checkpoint: str | None,
        dtype: str,
        force: bool,
        custom_import: str = "",
    ):
        self._checkpoints, self._out = checkpoints, out
        self._settings = {
            "description": description.to_json(),
            "entropy_checkpoint": entropy_checkpoint,
            "dtype": dtype,
            "force": force,
            "custom_import": custom_import,
        }
        self._waiting: list[int] = []
        self._linked: deque[int] = deque()
        self._remove_partial()
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0
        self.failed: list[str] = []
        """What went wrong, one sentence for each."""

    def go_on_from(self, resumed_at: int, is_exported: Callable[[int], bool]) -> None:
        """Go on with what the run did not come to before it was stopped, or before it went back; forget the rest.

        Args:
            resumed_at: the step of the checkpoint that it goes on from; later ones are abandoned.
            is_exported: whether the checkpoint of a step should have a directory.
        """
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._waiting.clear()
        self._linked.clear()
        self._remove_partial()
        set_later_aside(self._out, resumed_at, is_kept=Path.is_dir)
        # What is still linked had not been exported to its end.
        linked, saved = complete_steps(self._out / _LINKS), complete_steps(self._checkpoints)
        exported = {step for step in saved if (self._directory(step) / "config.json").is_file()}
        due = linked.keys() | set(filter(is_exported, saved.keys() - exported))
        due = {step for step in due if step <= resumed_at}
        for path in (self._out / _LINKS).glob("*"):
            if path not in {self._links(step) for step in due & linked.keys()}:
                self._unlink(path)
        for step in sorted(due):
            if step in linked:
                self._linked.append(step)
            else:
                self._link(step)
        if self._linked:
            logger.info(f"still to export to {self._out}: steps {', '.join(map(str, self._linked))}")

    def _remove_partial(self) -> None:
        for partial in self._out.glob(".step-*.partial"):  # of an export that was killed
            shutil.rmtree(partial, ignore_errors=True)

    def add(self, step: int) -> None:
        """Export the checkpoint of a step as soon as it is complete on disk."""
        if step not in self._waiting:
            self._waiting.append(step)

    def poll(self) -> None:
        """Look after the export that runs, and begin the next if it can; returns at once."""
        for step in list(self._waiting):
            if is_complete(step_folder(self._checkpoints, step)):
                self._waiting.remove(step)
                self._link(step)
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._end()
        if self._linked:
            self._begin(self._linked.popleft())

    def finish(self, leaves: Callable[[], bool] = lambda: False) -> bool:
        """Wait for what is under way; the run has ended, so checkpoints that are not complete by now never will be.

        Args:
            leaves: asked again and again; once it is true nothing is waited for any more.

        Returns:
            Whether all are done.

        Raises:
            ExportFailedError: one failed, now or before.
        """
        while True:
            self.poll()
            if self._process is None:
                break
            if leaves():
                return False
            time.sleep(_POLL_S)
        for step in self._waiting:
            self.failed.append(f"{step_folder(self._checkpoints, step)} is not complete, so it was not exported")
        self._waiting.clear()
        if self.failed:
            raise ExportFailedError("; ".join(self.failed))
        return True

    def stop(self) -> None:
        """End what is under way; that and the rest are for the run that resumes this one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if left := complete_steps(self._out / _LINKS):
            steps = ", ".join(map(str, left))
            logger.warning(f"not exported: steps {steps}; they are kept in {self._out / _LINKS} until the run resumes")

    def _links(self, step: int) -> Path:
        return step_folder(self._out / _LINKS, step)

    def _directory(self, step: int) -> Path:
        return step_folder(self._out, step)

    @property
    def _log(self) -> Path:
        return self._directory(self._step).with_suffix(".log")

    def _link(self, step: int) -> None:
        links, source = self._links(step), step_folder(self._checkpoints, step)
        self._unlink(links)
        links.parent.mkdir(parents=True, exist_ok=True)
        partial = links.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(source, partial, copy_function=os.link)
        except (OSError, shutil.Error):
            # The file system has no hard links: read in place.
            shutil.rmtree(partial, ignore_errors=True)
            links.symlink_to(source.resolve())
        else:
            partial.rename(links)  # complete, or not there: a run may be killed at any time
        self._linked.append(step)

    @staticmethod
    def _unlink(links: Path) -> None:
        links.unlink() if links.is_symlink() else shutil.rmtree(links, ignore_errors=True)
        with suppress(OSError):
            links.parent.rmdir()  # unless there are more

    def _begin(self, step: int) -> None:
        self._step = step
        settings = self._settings | {"checkpoint": str(self._links(step)), "out": str(self._directory(step))}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "blt_titan.training.exports", json.dumps(settings)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )

    def _end(self) -> None:
        assert self._process is not None
        code, self._process = self._process.returncode, None
        self._unlink(self._links(self._step))
        if code == 0:
            self._log.unlink(missing_ok=True)
            logger.info(f"exported {self._directory(self._step)}")
            return
        lines = self._log.read_text(errors="replace").strip().splitlines()
        why = f"{self._directory(self._step)} was not exported: {lines[-1] if lines else f'exit code {code}'}"
        logger.error(f"{why} (see {self._log})")
        self.failed.append(why)


def main(arguments: Sequence[str]) -> int:
    """Export one checkpoint; the argument is JSON."""
    os.nice(_NICENESS)
    settings = json.loads(arguments[0])
    entropy = settings["entropy_checkpoint"]
    if settings["custom_import"]:
        import_custom(settings["custom_import"])
    export_hf(
        stored_weights(settings["checkpoint"], description=Description.from_json(settings["description"], "the run")),
        settings["out"],
        entropy=stored_weights(entropy) if entropy else None,
        dtype=getattr(torch, settings["dtype"]),
        force=settings["force"],
        overwrite=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
