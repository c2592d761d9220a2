"""The examples run as they stand, with fewer steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hf_models import RULE, entropy_model, random_blt

ROOT = Path(__file__).parent.parent


def run(example: str, *arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, f"examples/{example}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_each_says_how_it_is_run():
    for path in (ROOT / "examples").glob("*.py"):
        assert f"python examples/{path.name} --" in path.read_text().split('"""')[1]


def test_plain_pytorch(tmp_path):
    (tmp_path / "text.txt").write_text("A house has many rooms, and every fact lives in one of them.\n" * 30)
    out = run("plain_pytorch", "--file", str(tmp_path / "text.txt"), "--steps", "12")
    first, last = (float(bits) for bits in re.findall(r"step \d+: ([\d.]+) bits per byte", out))
    assert last < first < 8
    assert "A house has many rooms, and every fact l" in out


@pytest.mark.slow
def test_own_patching_rule(tmp_path):
    out = run("own_patching_rule", "--out", str(tmp_path), "--steps", "2")
    assert "[b'de', b'f ', b're', b'ad_', b'do', b'cu', b'me', b'nts(', b'pa', b'th)', b':']" in out
    [bits] = re.findall(r"^ +([\d.]+) .* \S*own_patching_rule.py$", out, re.MULTILINE)
    assert 0 < float(bits) < 12


def test_in_transformers(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: make setup-dev")
    random_blt().save_pretrained(tmp_path / "blt", entropy_model=entropy_model(), rule=RULE)
    out = run("in_transformers", "--model", str(tmp_path / "blt"), "--max-bytes", "8")
    theirs, ours = re.findall(r"^(?:transformers: |blt_titan:    )(.*)$", out, re.MULTILINE)
    assert theirs == ours
