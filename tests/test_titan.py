"""What needs no run does not import torchtitan, which takes seconds."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LIGHT_VERBS = (
    "cli",
    "calibrate",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "plots",
    "prepare",
    "score",
    "view",
    "import_",
    "harness",
)


def test_verbs_that_need_no_run_import_no_torchtitan():
    modules = ", ".join(f"blt_titan.commands.{verb}" for verb in LIGHT_VERBS)
    program = f"import sys, {modules}; print([name for name in sys.modules if name.startswith('torchtitan')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
