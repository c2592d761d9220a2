"""What a command did to files, and whether that and what it said is allowed.

A case has a folder: `in` (its inputs), `out` (named as its output), `cwd` and `tmp`. Snapshots before and after tell
what changed there; an audit hook sees, and prevents, what Python code would write elsewhere on the machine.
"""

import errno
import hashlib
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.verbs import verb_of

TRACEBACK = "Traceback (most recent call last)"
TRACEBACK_PARTS = re.compile(r'File "[^"]+", line|\^\^\^|<class |object at 0x')
INTERNALS = re.compile(
    r"object has no attribute|NoneType|is not subscriptable|unexpected keyword|positional argument"
    r"|not supported between|unsupported operand|object is not (iterable|callable)|argument must be"
)
"""What Python says to programmers; in parentheses it is the detail of a sentence that says what is wrong."""
_HARMLESS = ("/dev/", "/proc/", "/sys/")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS_OF_EVENT = {
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.chown", "os.utime"), ((0, 3),)),
    **dict.fromkeys(("os.truncate", "os.setxattr"), ((0, None),)),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}
"""For each event the places of a path and of the folder's descriptor among its arguments."""
_EXECUTING = ("os.system", "os.exec", "os.posix_spawn", "pty.spawn")

Snapshot = dict[str, tuple[Any, ...]]


@dataclass
class Case:
    """One command line, and what it may do."""

    command: str
    arguments: list[str]
    refused: list[str] = field(default_factory=list)
    """What of it must not be done: the command ends with an exit code that is not 0."""
    environment: dict[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    writable: list[str] = field(default_factory=lambda: ["out"])
    """Paths below the case's folder."""
    left_by_error: list[str] = field(default_factory=list)
    """Paths that may be there after an error too, because the next start goes on from them."""
    touched: list[str] = field(default_factory=list)
    """Paths that may be written whatever comes of it, as the lock of a run's folder is."""
    kept: list[str] = field(default_factory=list)
    """Paths inside `writable` that stay as they are."""
    shown: dict[str, str] = field(default_factory=dict)
    """Generated files that say most about the case, by name."""
    done: list[str] = field(default_factory=list)
    """What was done to its inputs."""
    again: list[str] = field(default_factory=list)
    """More arguments of a second start, after a first that ended well."""
    damaged_between: str = ""
    """The folder that is damaged between the two."""


def snapshot(folder: Path) -> Snapshot:
    """Describe everything below a folder; nothing is followed."""
    found: Snapshot = {}
    below = len(os.fsencode(folder)) + 1
    for directory, directories, files in os.walk(os.fsencode(folder)):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            said = os.lstat(path)
            kind = stat.S_IFMT(said.st_mode)
            what: Any = None
            if kind == stat.S_IFREG:
                with open(path, "rb") as file:
                    what = hashlib.sha1(file.read()).hexdigest()
            elif kind == stat.S_IFLNK:
                what = os.readlink(path)
            found[os.fsdecode(path[below:])] = (kind, stat.S_IMODE(said.st_mode), said.st_mtime_ns, what)
    return found


def differences(before: Snapshot, after: Snapshot) -> dict[str, str]:
    """Say of each path what happened to it."""
    found = {}
    for path in sorted(before.keys() | after.keys()):
        if path not in before:
            found[path] = "created"
        elif path not in after:
            found[path] = "removed"
        elif before[path] != after[path]:
            same_content = before[path][:2] == after[path][:2] and before[path][3] == after[path][3]
            found[path] = "touched" if same_content else "changed"
    return found


def forbidden_changes(case: Case, exit_code: int, changed: dict[str, str]) -> list[str]:
    """List the changes that the case does not allow."""
    allowed = [*case.writable, "cwd"] if exit_code == 0 else [] if case.refused else case.left_by_error
    allowed = [*allowed, *case.touched]
    faults = []
    for path, what in changed.items():
        parents_of_allowed = what == "touched" and any(f"{a}/".startswith(f"{path}/") for a in allowed)
        if parents_of_allowed or (_below(path, ["tmp"]) and not _below(path, case.kept)):
            continue
        if not _below(path, allowed) or _below(path, case.kept):
            faults.append(f"{path!r} {what}")
    return faults


def _below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def what_is_wrong_with_the_outcome(case: Case, exit_code: Any, stdout: str, stderr: str) -> list[str]:
    """List what is not allowed in an exit code and in what was said."""
    faults = []
    if TRACEBACK in stderr or TRACEBACK in stdout:
        faults.append("prints a traceback: " + (stderr + stdout).split(TRACEBACK)[-1].strip().splitlines()[-1])
    if exit_code not in (0, 1, 2, 130):
        faults.append(f"exit code {exit_code!r}")
    if exit_code == 0 and case.refused:
        faults.append(f"is done although it should be refused: {', '.join(case.refused)}")
    if exit_code in (1, 2, 130):
        last = (stderr.strip().splitlines() or [""])[-1]
        if case.command == "train" and (errors := re.findall(r".* - ERROR - .*", stdout + stderr)):
            last = errors[-1]
        prefix = {
            "inspect_data": r"(blt-titan inspect: error|damaged): ",
            "checkpoint": r"(blt-titan checkpoint: error|damaged): ",
            "run_config": r"([\w.]+: )?error: ",
            "train": r"(.* - ERROR - |([\w.]+: )?error: )",
        }.get(case.command, rf"blt-titan {verb_of(case.command)}: (error|stopped)[:;] ")
        if not re.match(prefix + r".*\S+ \S+", last):
            faults.append(f"exit code {exit_code} without a sentence; the last line of stderr is {last[:200]!r}")
        elif leaked := TRACEBACK_PARTS.search(last) or INTERNALS.search(re.sub(r"\(.*\)", "", last)):
            faults.append(f"the sentence leaks Python ({leaked[0]!r}): {last[:300]}")
    return faults


class Guard:
    """Watch this process for writes outside of some folders; there is no way to take it off again."""

    def __init__(self, allowed: list[str]):
        self.faults: list[str] = []
        self.on = True
        self._allowed = tuple(f"{os.path.realpath(path)}/" for path in allowed)
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            # Of a directory only a file without a name is opened, which leaves nothing: so commands try whether it can
            # be written.
            if isinstance(path, (str, bytes)) and flags & _WRITING and not os.path.isdir(path):
                self._check(event, path, None)
        elif event in _PATHS_OF_EVENT:
            for place, descriptor in _PATHS_OF_EVENT[event]:
                if isinstance(arguments[place], (str, bytes)):
                    self._check(event, arguments[place], None if descriptor is None else arguments[descriptor])
        elif event in _EXECUTING:
            self.faults.append(f"executes a program: {event} {arguments!r}"[:300])
            raise PermissionError(errno.EACCES, "a case may not start programs")

    def _check(self, event: str, path: str | bytes, folder: int | None) -> None:
        name = os.fsdecode(path)
        if folder is not None and folder >= 0 and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        place = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(name))), os.path.basename(name)) + "/"
        if not place.startswith(self._allowed + _HARMLESS):
            self.faults.append(f"writes outside of the case's folder: {event} {name!r}"[:300])
            raise PermissionError(errno.EACCES, "Permission denied", name)
