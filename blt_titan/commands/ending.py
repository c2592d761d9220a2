"""How every command ends: with a line on standard error instead of a traceback, and an exit code that says why.

Settings of a run may have several faults; each has a line.

0    done
1    something is damaged, or memory ran out
2    asked for in a way that cannot be done; what is wrong, what was given and what is allowed
130  stopped by Ctrl-C
141  whoever read standard output has had enough (as in `| head`); nothing is said
"""

import contextlib
import functools
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

Main = Callable[..., int]
"""Called with the arguments, or without for those of the command line."""

_importing = "blt-titan"
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""As torch's RuntimeErrors say it, of a device and of this machine."""


def command(name: str, *expected: type[Exception], code: int = 2, stopped: str = "stopped") -> Callable[[Main], Main]:
    """Have `main` return an exit code whatever happens, but for faults of the program.

    Args:
        name: of the command, which its messages begin with.
        expected: errors, beside OSError, whose message tells the user what is wrong.
        code: what is returned after one of them.
        stopped: what is said after Ctrl-C.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(arguments: Sequence[str] | None = None) -> int:
            if isinstance(sys.stdout, io.TextIOWrapper):
                # Names of files need not be UTF-8, and a terminal may know other characters than ours.
                sys.stdout.reconfigure(errors="backslashreplace")
            if signal.getsignal(signal.SIGINT) is _stop_at_once:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                done = _returned(main, arguments)
                _flush_output()
                return done
            except KeyboardInterrupt:
                return _say(name, [stopped], 130)
            except (*expected, OSError) as error:
                if isinstance(error, BrokenPipeError) and (_has_no_reader(sys.stdout) or _has_no_reader(sys.stderr)):
                    _silence()
                    return 141
                return _say(name, [f"error: {sentence}" for sentence in _sentences(error)], code)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
                    raise
                return _say(name, [f"error: memory ran out: {' '.join(str(error).split())[:200]}"], 1)

        return run

    return decorate


def end_quietly_while_importing(name: str) -> None:
    """Have Ctrl-C end a command in one line while modules are imported, before there is a `main` to catch it.

    Args:
        name: of the command, which the line begins with.
    """
    global _importing
    _importing = name
    # Where it is ignored, as in the background of a shell, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)


def _stop_at_once(number: int, frame: Any) -> None:
    # No exception: torch's C++ code, which it could meet, aborts the process.
    _say(_importing, ["stopped"], 130)
    os._exit(130)


def _returned(main: Main, arguments: Sequence[str] | None) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # of argparse, which has said why; 0 of --help
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0


def _sentences(error: BaseException) -> Sequence[str]:
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror]
    # Settings may have several faults, each of which has a line.
    return getattr(error, "sentences", [str(error)])


def _say(name: str, messages: Sequence[str], code: int) -> int:
    with contextlib.suppress(OSError):  # nobody may be reading it
        for message in messages:
            # A name may hold line ends, and so may what a library says.
            print(f"{name}: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    _silence()
    return code


def _has_no_reader(stream: Any) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _silence() -> None:
    """Send to nowhere what is still held back for streams that cannot be written, so that the exit says nothing."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
