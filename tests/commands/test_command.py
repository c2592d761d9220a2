"""How commands end: Ctrl-C, a reader that has gone, a full disk, memory that ran out."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blt_titan.commands.ending import command
from tests.helpers.verbs import COMMANDS, module_of, program_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_in_one_line(name, capsys, monkeypatch):
    module = module_of(name)
    for error, code, said in (
        (KeyboardInterrupt(), 130, ": stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), None, ": error: out/x: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), None, ": error: x: Permission denied\n"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, ": error: memory ran out: CUDA out of memory"),
    ):

        def parse_args(arguments=None, error=error):
            raise error

        monkeypatch.setattr(module, "parse_args", parse_args)
        assert module.main([]) in ((1, 2) if code is None else (code,))
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(program_of(name) + said)
        assert captured.err.count("\n") == 1


def test_a_fault_of_the_program_is_not_hidden():
    @command("x", ValueError)
    def main(arguments=None):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        main([])


def run_until(program: str, **streams) -> subprocess.CompletedProcess:
    """Run a command made of `program` in a process of its own."""
    head = "import sys\nfrom blt_titan.commands.ending import command\n@command('x')\ndef main(arguments=None):\n"
    command = [sys.executable, "-c", f"{head}{program}\nsys.exit(main())"]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **streams)


LINES = "    for i in range(100_000): print(i)\n    return 0"
LAST_LINE = "    print('x')\n    return 0"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("program", [LINES, LAST_LINE])
def test_a_reader_that_has_gone_ends_it_quietly(program, unbuffered):
    read, write = os.pipe()
    os.close(read)
    try:
        done = run_until(program, stdout=write, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_whose_reader_has_gone(option):
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "blt_titan", *option.split()]
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("program", [LINES, LAST_LINE])
def test_a_full_disk_under_standard_output(program, unbuffered):
    with open("/dev/full", "w") as full:
        done = run_until(program, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    what = "standard output: " if program == LAST_LINE and not unbuffered else ""
    assert (done.returncode, done.stderr) == (2, f"x: error: {what}No space left on device\n")


def test_a_pipe_that_is_not_standard_output_does_not_pass_for_it():
    broken = "    raise BrokenPipeError(32, 'Broken pipe')"
    done = run_until(broken, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (2, "x: error: Broken pipe\n")


def test_what_a_terminal_cannot_show_is_escaped():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run_until("    print('█', '\\udcff')\n    return 0", stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout) == (0, "\\u2588 \\udcff\n")


@pytest.mark.slow
def test_help_and_ctrl_c_while_modules_are_imported():
    """A moment when a part of torch is there and the command has not begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "blt_titan", "generate", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and what they start does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (130, "", "blt-titan generate: stopped\n")
