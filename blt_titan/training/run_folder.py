"""What a run holds of its folder: an exclusive lock, and the settings it runs with.

<dump_folder>/run.lock      who holds the folder, as JSON; the lock itself is the kernel's and ends with the process
<dump_folder>/config.toml   every setting in effect, and the command; `blt-titan train <dump_folder>/config.toml`
                            is that run again
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import tomli_w

from blt_titan.config.effective import effective_settings
from blt_titan.config.read import CONFIG_FILE_KEY
from blt_titan.config.run_config import RunConfig
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.monitor.record import LOCK_NAME

CONFIG_NAME = "config.toml"


class RunFolderError(ValueError):
    """The folder of a run cannot be used; the message says why."""


class RunLock:
    """An exclusive lock on the folder of a run, held until `release` or until the process ends, however it ends.

    It is a record lock (`fcntl.lockf`): other hosts see it on file systems that share locks, and processes that this
    one forks do not keep it alive.

    Raises:
        RunFolderError: another run holds it, named by host and process; or the folder cannot be written.
    """

    def __init__(self, dump_folder: str | os.PathLike[str]):
        self._folder = Path(dump_folder)
        self._descriptor: int | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._lock():
                pass
        except _HeldError as held:
            raise RunFolderError(
                f"job.dump_folder = {str(self._folder)!r}: another run writes there ({held}); wait for it, stop it, or "
                "choose another job.dump_folder"
            ) from None
        except (OSError, ValueError) as error:
            self.release()
            if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise RunFolderError(
                    f"job.dump_folder = {str(self._folder)!r}: {LOCK_NAME} cannot be locked ({error.strerror}), so two "
                    "runs could write there; choose a folder on a file system with locks"
                ) from error
            why = getattr(error, "strerror", None) or error
            raise RunFolderError(
                f"job.dump_folder = {str(self._folder)!r}: cannot be written ({why}); choose another, or make room"
            ) from error

    @property
    def _path(self) -> Path:
        return self._folder / LOCK_NAME

    def _lock(self) -> bool:
        """Take the lock; False if its file was removed meanwhile, by `try_folder` of another process."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(os.pread(self._descriptor, 4096, 0))
            self.release()
            raise _HeldError(holder) from None
        if not self._path.exists() or not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
            self.release()
            return False
        held = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (json.dumps(held) + "\n").encode(), 0)
        os.fsync(self._descriptor)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Let others have the folder; `remove` also its file."""
        if self._descriptor is not None:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


class _HeldError(Exception):
    """Another process holds the lock; the message says which."""


def try_folder(dump_folder: str | os.PathLike[str]) -> None:
    """Check that a run could have a folder, and leave it as it was.

    Raises:
        RunFolderError: as `RunLock`.
    """
    folder = Path(dump_folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    had_lock = (folder / LOCK_NAME).exists()
    try:
        RunLock(folder).release(remove=not had_lock)
    finally:
        for path in made:
            with suppress(OSError):  # not made after all, or used by now
                path.rmdir()


def _holder(written: bytes) -> str:
    try:
        holder = json.loads(written)
        return f"process {holder['pid']} on host {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return f"{LOCK_NAME} does not say which"


def record_settings(
    config: RunConfig, *, command: list[str] | None = None, environment: Mapping[str, str] = os.environ
) -> Path:
    """Write the settings of a run into its folder; those of an earlier start, if they differ, stay beside them.

    Args:
        config: the run's settings.
        command: what a rank was started with: --job.config_file and overrides; default those of this process.
        environment: NGPU and NNODES, the ranks of a node and the nodes, and WORLD_SIZE, if they are known.

    Raises:
        RunFolderError: the file cannot be written.
    """
    path = Path(config.job.dump_folder) / CONFIG_NAME
    settings = tomli_w.dumps(effective_settings(config))
    arguments = sys.argv[1:] if command is None else command
    ranks = [
        f"{option}={environment[key]}"
        for option, key in (("--nproc", "NGPU"), ("--nnodes", "NNODES"))
        if environment.get(key, "1") != "1"
    ]
    header = (
        f"# The settings of a run, started {time.strftime('%Y-%m-%d %H:%M:%S')} by\n"
        f"#   {_command_line([*_config_and_overrides(arguments), *ranks])}\n"
        f"# in {os.getcwd()!a} on {socket.gethostname()}, {environment.get('WORLD_SIZE', '1')} ranks. To resume it:\n"
        f"#   {_command_line([str(path), *ranks])}\n\n"
    )
    try:
        if path.exists() and not path.read_text(errors="replace").endswith("\n\n" + settings):
            path.rename(path.with_name(f"config-{time.strftime('%Y%m%d-%H%M%S')}.toml"))
        write_atomically(path, (header + settings).encode(errors="backslashreplace"))
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror}); make room, or choose another job.dump_folder"
        ) from error
    return path


def _config_and_overrides(arguments: Sequence[str]) -> list[str]:
    """Put the configuration of a rank's arguments first, by its path alone, as `blt-titan train` takes it."""
    option = f"--{CONFIG_FILE_KEY}"
    rest: list[str] = []
    configs: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == option:
            configs.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return configs + rest


def _command_line(words: Sequence[str]) -> str:
    line = shlex.join(["blt-titan", "train", *words])
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
