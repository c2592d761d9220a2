import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

PROGRAM = """
import time
from blt_titan import progress
progress.LINE_INTERVAL_S = 0.1
with progress.ProgressBar(total=200, unit="B", desc="reading", leave=False) as bar:
    for _ in range(200):
        time.sleep(0.002)
        bar.update(1)
        bar.set_postfix_str("2.5 bits")
"""


def test_in_a_file_there_are_few_whole_lines():
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stderr
    assert "\r" not in said
    lines = said.splitlines()
    assert 2 <= len(lines) <= 8, said
    assert lines[-1].startswith("reading: 100% 200/200 in 00:0")
    assert all(line.startswith("reading: ") and "|" not in line for line in lines)
    assert lines[-1].endswith(", 2.5 bits")


def test_short_work_says_its_end_only():
    program = PROGRAM.replace("progress.LINE_INTERVAL_S = 0.1\n", "")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert said.count("\n") == 1


def test_on_a_terminal_it_is_a_bar():
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new one has no columns
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=child)
    os.close(child)
    said = b""
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:  # the child has ended
            break
        if not piece:
            break
        said += piece
    process.wait()
    assert said.count(b"\r") > 2
    assert b"|" in said


def test_a_disabled_bar_says_nothing():
    program = PROGRAM.replace("leave=False", "disable=True")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
