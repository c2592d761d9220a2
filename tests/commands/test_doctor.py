"""`blt-titan doctor`: what it finds here, and what it says where something is missing."""

import importlib.metadata
import json
import platform
import resource

import pytest
import torch

from blt_titan.commands import doctor


@pytest.fixture
def versions(monkeypatch):
    """Let packages have other versions: a dict, where None is a package that is not installed."""
    others: dict[str, str | None] = {}
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: others[name] if name in others else installed(name))
    return others


def test_it_finds_what_is_here(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "devices", "limits", "missing", "remarks"}
    assert found["missing"] == []
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(found["devices"]["gpus"]) == torch.cuda.device_count()
    assert found["limits"]["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    assert report.endswith("nothing necessary is missing\n")
    for name in ("torchtitan", "numpy", "transformers", "cpu_cores", "shared_memory_gib"):
        assert f"  {name} " in report


def test_what_only_a_part_needs_is_a_remark(versions, capsys):
    versions |= {"torchao": None, "lm-eval": "0.3", "transformers": None, "starlette": None, "uvicorn": None}
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for sentence in (
        "float8 training needs torchao",
        "pip install 'blt_titan[float8]'",
        "blt-titan harness needs lm-eval",
        "(there is 0.3): pip install 'blt_titan[harness]'",
        "blt-titan plots needs starlette",
        "loading exports there, and comparing an export with them needs transformers: pip install transformers",
    ):
        assert sentence in report


def test_what_is_necessary_ends_with_1(versions, capsys):
    versions |= {"numpy": None, "torchtitan": "0.2.1"}
    assert doctor.main(["--json"]) == 1
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert missing == [
        "torchtitan==0.2.2 (there is 0.2.1): pip install 'torchtitan==0.2.2'",
        "numpy>=2.0: pip install 'numpy>=2.0'",
    ]
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith("training does not work here\n")


def test_a_gpu_that_torch_cannot_use_is_a_remark(monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [remark] = [remark for remark in doctor.examine()["remarks"] if "NVIDIA" in remark]
    assert "an NVIDIA driver (570.1) is here, but this build of torch has no CUDA" in remark


def test_tight_limits_are_remarks(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 1024))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("U", (), {"total": 2**26, "free": 2**30}))
    remarks = doctor.examine()["remarks"]
    assert any("may open 256 files" in remark and "the hard limit is 1024" in remark for remark in remarks)
    assert any("/dev/shm has 64 MiB" in remark and "--shm-size" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11", False),
        ("0.2.2", "==0.2.2", True),
        ("2.0.0", ">=2.0", True),
        ("5", "", True),
    ],
)
def test_ranges_of_versions(version, wanted, fits):
    assert doctor._fits(version, wanted) is fits
