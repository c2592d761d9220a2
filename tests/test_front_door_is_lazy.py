"""`import blt_titan` needs neither torch nor torchtitan, and each name leads to what it names."""

import subprocess
import sys

import pytest

import blt_titan


def test_importing_the_package_imports_nothing_large():
    code = (
        "import sys, blt_titan\n"
        "assert blt_titan.__version__ and 'generate' in dir(blt_titan)\n"
        "large = {'torch', 'torchtitan', 'numpy', 'transformers'} & sys.modules.keys()\n"
        "assert not large, large\n"
        "from blt_titan import BLT\n"
        "assert 'torchtitan' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_names_lead_to_what_they_name():
    for name in blt_titan.__all__:
        assert getattr(blt_titan, name) is not None
    assert blt_titan.BLT.__name__ == "PretrainedBLT"
    with pytest.raises(AttributeError, match="has no attribute 'Blt'"):
        blt_titan.Blt  # noqa: B018
