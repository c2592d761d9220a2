"""Random command lines on random inputs: each ends well, or with one sentence and an exit code of 1, 2 or 130.

pytest tests/fuzz                            200 cases, about a minute
FUZZ=5000 pytest tests/fuzz                  more, and real training among them
FUZZ_SEED=3 pytest tests/fuzz                other ones
FUZZ_CASE=0:123 pytest -s tests/fuzz         one, printed, and its folder kept
FUZZ_COMMAND=generate pytest tests/fuzz      one command alone; `train` is one (so is it with FUZZ_CASE, then)
FUZZ_LOG=FILE pytest tests/fuzz              also write what came of each case, a line of JSON
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.worker import CACHES

ROOT = Path(__file__).parents[2]
CASES = 200
WORKERS = 2
ONLY = os.environ.get("FUZZ_COMMAND", "")
MOST_SHOWN = 40
"""Kinds of findings that are shown in full."""


class Worker:
    """A process of `tests.fuzz.worker`."""

    def __init__(self, base: Path, log: Path):
        environment = os.environ | {
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)},
            **{"CUDA_VISIBLE_DEVICES": "", "NGPU": "1", "NNODES": "1", "COLUMNS": "200"},
            # torch chooses a folder for compiled headers when it is imported.
            "TMPDIR": str(base.parent / CACHES),
        }
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(base)],
                **{"cwd": ROOT, "env": environment, "text": True, "stderr": file},
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
            )
        self._log = log

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the worker has ended:\n{self._log.read_text()[-4000:]}"
        return json.loads(line)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / CACHES).mkdir()
    started = [Worker(folder / "base", folder / f"worker{number}.log") for number in range(WORKERS)]
    made = started[0].ask(make_base=True)
    assert (folder / "base/hf").is_dir(), made
    yield started
    for worker in started:
        worker.stop()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_commands_end_well_or_with_a_sentence(workers, tmp_path):
    if one := os.environ.get("FUZZ_CASE"):
        seed, number = map(int, one.split(":"))
        answer = run_case(workers[0], tmp_path, seed, number, keep=True)
        print(shown(seed, number, answer), f"\nits folder: {tmp_path / str(number)}")
        assert not answer["faults"]
        return
    seed, count = int(os.environ.get("FUZZ_SEED", "0")), int(os.environ.get("FUZZ", CASES))
    answers = run_cases(workers, tmp_path, seed, count)
    ended = defaultdict(int)
    for answer in answers.values():
        ended[f"{answer['command']}: exit code {answer['exit']}"] += 1
    print("\n".join(f"{how}: {times}" for how, times in sorted(ended.items())))
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, answer in sorted(answers.items()):
        for fault in answer["faults"]:
            kinds[kind_of(answer["command"], fault)].append(number)
    said = []
    for kind, numbers in sorted(kinds.items(), key=lambda item: -len(item[1]))[:MOST_SHOWN]:
        said.append(f"{len(numbers)} x {kind}\n{shown(seed, numbers[0], answers[numbers[0]])}")
    if kinds:
        pytest.fail(f"{len(kinds)} kinds of findings in {count} cases\n\n" + "\n\n".join(said), pytrace=False)


def run_cases(workers: list[Worker], folder: Path, seed: int, count: int) -> dict[int, dict[str, Any]]:
    left, answers = iter(range(count)), {}
    lock = threading.Lock()
    began = time.monotonic()

    def work(worker: Worker) -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            answers[number] = run_case(worker, folder, seed, number)
            if log := os.environ.get("FUZZ_LOG"):
                with lock, open(log, "a") as file:
                    file.write(json.dumps({"case": f"{seed}:{number}"} | answers[number]) + "\n")
            if len(answers) % 500 == 0:
                print(f"{len(answers)} cases in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == count, "a worker has ended"
    return answers


def run_case(worker: Worker, folder: Path, seed: int, number: int, *, keep: bool = False) -> dict[str, Any]:
    place = folder / str(number)
    answer = worker.ask(seed=seed, number=number, only=ONLY, folder=str(place))
    if not keep:
        shutil.rmtree(place, ignore_errors=True)
    return {"command": "?", "line": "?"} | answer


def kind_of(command: str, fault: str) -> str:
    """Name a finding so that those of one cause have one name."""
    plain = re.sub(r"/[^ ]*/", ".../", re.sub(r"'[^']*'", "'...'", fault))
    return f"{command}: {re.sub(r'[0-9]+', 'N', plain)[:110]}"


def shown(seed: int, number: int, answer: dict[str, Any]) -> str:
    """Say all that one needs to see a case again."""
    only = f"FUZZ_COMMAND={ONLY} " if ONLY else ""
    parts = [f"{only}FUZZ_CASE={seed}:{number} ({answer['seconds']:.1f} s, exit code {answer['exit']})", answer["line"]]
    for name in ("again", "done", "refused", "stacks"):
        if answer.get(name):
            parts.append(f"{name}: {answer[name]}")
    parts += [f"--- {name}\n{content[:1500]}" for name, content in answer.get("shown", {}).items()]
    parts += [f"--- {name}\n{answer[name][-1500:]}" for name in ("stdout", "stderr") if answer.get(name)]
    said = "\n".join([*parts, *(f"FINDING: {fault}" for fault in answer["faults"])])
    return said.encode(errors="backslashreplace").decode()
