"""A process that has imported everything, and forks a child for each case: `python -m tests.fuzz.worker BASE`.

In: lines of JSON, {"seed", "number", "only", "folder"}, or {"make_base"}. Out: one line of JSON for each. A child that
dies or hangs is a finding, and costs nothing but itself. All heavy imports are in functions, because processes that a
case spawns import this module again.
"""

import contextlib
import faulthandler
import importlib
import inspect
import io
import json
import os
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.helpers.verbs import verb_of

CPU_S, WALL_S = 20, 90
"""For one case: of its own, and on a busy machine."""
TRAINING_FACTOR = 6
MEMORY_BYTES = 4 << 30
FILE_BYTES = 1 << 30
CACHES = "caches"
"""A folder beside the base, for what libraries keep for all cases: fonts, compiled headers."""
STACKS_FILE, CASE_FILE, RESULT_FILE, STDOUT_FILE, STDERR_FILE = "stacks", "case.json", "result.json", "stdout", "stderr"


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    # What an import prints is no answer.
    os.dup2(2, 1)
    base = Path(sys.argv[1])
    mains = _import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        reports = Path(tempfile.mkdtemp(dir=base.parent))
        try:
            answer = _in_a_child(partial(_answer, request, base, reports, mains), reports)
        finally:
            shutil.rmtree(reports, ignore_errors=True)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _import_everything() -> dict[str, Callable[[list[str]], Any]]:
    import starlette.testclient  # noqa: F401

    import blt_titan.hf.verify.verify
    import blt_titan.plots.app  # noqa: F401
    from blt_titan import train
    from blt_titan.commands.cli import VERBS
    from blt_titan.config import check
    from tests.fuzz import base, commands  # noqa: F401
    from tests.fuzz.settings import all_keys

    all_keys()
    others: dict[str, Callable[..., Any]] = {"run_config": check.main, "train": train.main}
    names = {make.__name__ for make in commands.GRAMMAR} - others.keys()
    verbs = {name: importlib.import_module(f"blt_titan.commands.{VERBS[verb_of(name)][0]}").main for name in names}
    return verbs | others


def _in_a_child(function: Callable[[], None], reports: Path) -> dict[str, Any]:
    """Call a function in a child of its own process group; read what it wrote, or say how it ended."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            function()
            status = 0
        except BaseException:
            (reports / STACKS_FILE).write_text(traceback.format_exc())
        finally:
            os._exit(status)
    descriptor = os.pidfd_open(pid)
    wall_s = WALL_S
    ended = bool(select.select([descriptor], [], [], wall_s)[0])
    if not ended and _trains(reports):
        wall_s *= TRAINING_FACTOR
        ended = bool(select.select([descriptor], [], [], wall_s - WALL_S)[0])
    if not ended:
        os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(descriptor)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    answer: dict[str, Any] = {"seconds": time.monotonic() - began, "faults": [], "exit": None}
    for name in (CASE_FILE, RESULT_FILE):
        with contextlib.suppress(FileNotFoundError):
            answer |= json.loads((reports / name).read_text())
    if not ended or status != 0:
        how = f"hangs, and was stopped after {wall_s} s" if not ended else _death(os.waitstatus_to_exitcode(status))
        stacks = reports / STACKS_FILE
        answer["stacks"] = stacks.read_text(errors="replace")[-4000:] if stacks.exists() else ""
        answer["faults"] = [*answer["faults"], how + _innermost(answer["stacks"])]
    for name in (STDOUT_FILE, STDERR_FILE):
        path = reports / name
        answer[name] = path.read_text(errors="backslashreplace")[-6000:] if path.exists() else ""
    return answer


def _trains(reports: Path) -> bool:
    described = reports / CASE_FILE
    return described.exists() and json.loads(described.read_text())["command"] == "train"


def _death(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"hangs: {CPU_S} s of computing"
    return f"the process dies of {signal.Signals(-code).name}" if code < 0 else f"the harness failed, exit code {code}"


def _innermost(stacks: str) -> str:
    lines = [line.strip() for line in stacks.splitlines() if "/blt_titan/" in line or "/scripts/" in line]
    return f" in {lines[0].split('/')[-1]}" if lines else ""


def _answer(request: dict[str, Any], base: Path, reports: Path, mains: dict[str, Any]) -> None:
    if "make_base" in request:
        from tests.fuzz.base import make_base

        base.mkdir()
        with _redirected(reports, b""):
            make_base(base)
        return
    from tests.fuzz.commands import make_case
    from tests.fuzz.draw import Draw
    from tests.fuzz.place import Place

    draw = Draw(request["seed"], request["number"])
    place = Place(Path(request["folder"]), base, draw)
    case = make_case(draw, place, request["number"], request["only"])
    (reports / CASE_FILE).write_text(json.dumps(_described(case)))
    result = _run_case(case, place.folder, reports, mains[case.command], base, draw)
    (reports / RESULT_FILE).write_text(json.dumps(result))


def _described(case: Any) -> dict[str, Any]:
    environment = "".join(f"{key}={shlex.quote(value)} " for key, value in case.environment.items())
    module = {"run_config": "blt_titan.config.check", "train": "blt_titan.train"}.get(case.command)
    program = f"python -m {module}" if module else f"blt-titan {verb_of(case.command)}"
    return {
        "command": case.command,
        "line": f"{environment}{program} {shlex.join(case.arguments)}",
        "again": shlex.join(case.again),
        "done": case.done,
        "refused": case.refused,
        "shown": case.shown,
    }


def _run_case(case: Any, folder: Path, reports: Path, main: Any, base: Path, draw: Any) -> dict[str, Any]:
    from tests.fuzz import watch
    from tests.fuzz.damage import damage

    trains = case.command == "train"
    cpu_s = CPU_S * (TRAINING_FACTOR if trains else 1)
    _set_limits(cpu_s, reports / STACKS_FILE)
    os.environ |= _environment(folder, base) | case.environment
    tempfile.tempdir = str(folder / "tmp")
    os.chdir(folder / "cwd")
    guard = watch.Guard([str(folder), str(reports), str(base.parent / CACHES)])
    faults: list[str] = []
    arguments = case.arguments
    while True:
        before = watch.snapshot(folder)
        with _redirected(reports, case.stdin):
            exit_code, raised = _call(main, case.command, arguments)
        stdout, stderr = (_read(reports / name) for name in (STDOUT_FILE, STDERR_FILE))
        guard.on = False
        changed = watch.differences(before, watch.snapshot(folder))
        if raised:
            faults.append(raised)
        else:
            faults += watch.what_is_wrong_with_the_outcome(case, exit_code, stdout, stderr)
            if forbidden := watch.forbidden_changes(case, exit_code, changed):
                faults.append(f"with exit code {exit_code} these are not as before: {', '.join(forbidden)}"[:400])
        if not case.again or exit_code != 0 or faults or arguments is not case.arguments:
            break
        if case.damaged_between:
            case.done.append("between: " + damage(draw, folder / case.damaged_between))
        arguments = [*case.arguments, *case.again]
        guard.on = True
    return {"exit": exit_code, "faults": faults + guard.faults, "done": case.done}


def _environment(folder: Path, base: Path) -> dict[str, str]:
    return {
        "HOME": str(folder / "cwd"),
        "TMPDIR": str(folder / "tmp"),
        "HF_HOME": str(folder / "tmp/hf"),
        "MPLCONFIGDIR": str(base.parent / CACHES),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "tmp/inductor"),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    }


def _set_limits(cpu_s: int, stacks: Path) -> None:
    file = open(stacks, "w")  # noqa: SIM115
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
    faulthandler.register(signal.SIGXCPU, file, chain=True)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _call(main: Any, command: str, arguments: list[str]) -> tuple[Any, str]:
    """Return the exit code, and what was raised, with the innermost line of the product."""
    from unittest import mock

    import uvicorn

    this, leave = os.getpid(), os._exit

    def leave_instead(code: int) -> None:
        # A rank that failed ends so; a process that it forked really has to.
        if os.getpid() != this:
            leave(code)
        raise SystemExit(code)

    sys.argv = [command, *arguments]
    try:
        with mock.patch("os._exit", leave_instead), mock.patch.object(uvicorn.Server, "run", _ask_for_all_pages):
            takes_arguments = bool(inspect.signature(main).parameters) and command != "train"
            code = main(arguments) if takes_arguments else main()
        return code or 0, ""
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
            return 1, ""
        return left.code or 0, ""
    except BaseException as error:
        root = f"{Path(__file__).parents[2]}/"
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root)]
        ours = [frame for frame in frames if not frame.filename.startswith((f"{root}tests/", f"{root}.venv/"))]
        place = f"{ours[-1].filename.removeprefix(root)}, {ours[-1].name}" if ours else "?"
        text = "".join(traceback.format_exception(error))[-4000:]
        print(text, file=sys.stderr)
        return None, f"raises {type(error).__name__} in {place}: {' '.join(str(error).split())[:200]}"


def _ask_for_all_pages(server: Any, sockets: list[Any]) -> None:
    from starlette.testclient import TestClient

    for listening in sockets:
        listening.close()
    client = TestClient(server.config.app, base_url="http://127.0.0.1")
    names = ["/", "/data/curves", "/data/scaling", "/visualizations/curves", "/visualizations/scaling"]
    names += ["/data/one/metrics.jsonl", "/data/../../etc/passwd", "/images/one/loss.png", "/data/no%00such.json"]
    found = client.get("/api/visualizations")
    for name in [*names, *(figure["url"] for figure in found.json())]:
        answer = client.get(name)
        if answer.status_code not in (200, 404):
            raise AssertionError(f"{name}: status {answer.status_code}")
        if name in ("/data/curves", "/data/scaling"):
            _strict_json(answer.text)


def _strict_json(text: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON, and no browser reads it")

    json.loads(text, parse_constant=refuse)


def _read(path: Path) -> str:
    return path.read_text(errors="backslashreplace")


@contextlib.contextmanager
def _redirected(reports: Path, stdin: bytes):
    """Send the standard streams of this process, of C code too, to files."""
    saved = [os.dup(descriptor) for descriptor in (0, 1, 2)]
    (reports / "stdin").write_bytes(stdin)
    sys.stdin = io.TextIOWrapper(open(reports / "stdin", "rb"))  # noqa: SIM115
    for descriptor, name in ((1, STDOUT_FILE), (2, STDERR_FILE)):
        file = os.open(reports / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(sys.stdin.fileno(), 0)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in enumerate(saved):
            os.dup2(original, descriptor)
            os.close(original)


if __name__ == "__main__":
    serve()
