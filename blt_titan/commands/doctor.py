"""Say what this machine has: versions, devices, limits, and what is missing for what.

    blt-titan doctor
    blt-titan doctor --json

Exit code 1 if something is missing without which nothing can be trained; what only a part needs is a remark. It
needs no package itself, so that it works where the installation does not.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blt_titan.commands.arguments import Parser
from blt_titan.commands.ending import command

NAME = "blt-titan doctor"
GIB = 2**30
LEAST_SHARED_BYTES = GIB
"""What /dev/shm should hold: loader workers and NCCL hand over memory there; containers often have 64 MiB."""
LEAST_OPEN_FILES = 4096
"""Shards, sidecars, workers and connections of a node with eight ranks."""
EXTRAS = {
    "float8": "float8 training",
    "harness": "blt-titan harness",
    "plots": "blt-titan plots",
    "demo": "blt-titan demo",
}
"""Extra of this package: what needs it."""
_BESIDE = {"transformers": "loading exports there, and comparing an export with them"}
"""Package that no extra brings: what needs it."""
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*(?P<range>[^;]*?)\s*(?:;(?P<marker>.*))?")


def make_parser() -> Parser:
    """Return what parses the command line."""
    parser = Parser(NAME, __doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(arguments)


@command(NAME)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code: 0, or 1 if something necessary is missing."""
    args = parse_args(arguments)
    found = examine()
    print(json.dumps(found, indent=2) if args.json else report(found))
    return 1 if found["missing"] else 0


def examine() -> dict[str, Any]:
    """Look at the machine.

    Returns:
        `versions` (None where a package is not installed), `devices`, `limits`, and two lists of sentences: `missing`,
        without which nothing can be trained, and `remarks`, about what is missing for a part.
    """
    versions, missing, remarks = _versions()
    devices, wrong = _devices()
    limits, tight = _limits()
    return {
        "versions": versions,
        "devices": devices,
        "limits": limits,
        "missing": [*missing, *wrong],
        "remarks": [*_without_their_gpu(devices), *tight, *remarks],
    }


def report(found: dict[str, Any]) -> str:
    """Return what was found as lines to read."""
    lines = []
    for title in ("versions", "devices", "limits"):
        lines.append(title)
        for name, value in found[title].items():
            values = (value or [None]) if isinstance(value, list) else [value]
            lines += [f"  {name:<24}{'-' if v is None else v}" for v in map(_shown, values)]
        lines.append("")
    lines += [f"missing: {sentence}" for sentence in found["missing"]]
    lines += [f"remark: {sentence}" for sentence in found["remarks"]]
    lines.append("nothing necessary is missing" if not found["missing"] else "training does not work here")
    return "\n".join(lines)


def _shown(value: Any) -> Any:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value


def _versions() -> tuple[dict[str, str | None], list[str], list[str]]:
    """Return the versions of all that is required or of use, what is missing, and what a part lacks."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "blt_titan": _version("blt_titan")}
    missing, lacking = [], dict[str, list[str]]()
    for name, wanted, extra in _requirements():
        versions[name] = found = _version(name)
        if found is not None and _fits(found, wanted):
            continue
        what = f"{name}{wanted}" + ("" if found is None else f" (there is {found})")
        if extra is None:
            missing.append(f"{what}: pip install '{name}{wanted}'")
        elif extra in EXTRAS:
            lacking.setdefault(extra, []).append(what)
    remarks = [
        f"{EXTRAS[extra]} needs {', '.join(names)}: pip install 'blt_titan[{extra}]'"
        for extra, names in lacking.items()
    ]
    for name, what in _BESIDE.items():
        versions[name] = _version(name)
        if versions[name] is None:
            remarks.append(f"{what} needs {name}: pip install {name}")
    return versions, missing, remarks


def _requirements() -> Iterator[tuple[str, str, str | None]]:
    """Yield the name, the range of versions and the extra of what the package says that it requires."""
    try:
        lines = importlib.metadata.requires("blt_titan") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        match = _REQUIREMENT.fullmatch(line)
        assert match is not None, line
        marker = match["marker"] or ""
        extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", marker)
        on_linux_only = "sys_platform" in marker and not sys.platform.startswith("linux")
        name = match["name"].replace("-", "_").lower()
        if on_linux_only or name == "blt_titan" or (extra and extra[1] not in EXTRAS):
            continue
        yield match["name"], match["range"].replace(" ", ""), extra[1] if extra else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(version: str, wanted: str) -> bool:
    """Tell whether a version is in a range such as `>=2.11,<2.14`.

    >>> _fits("2.13.0+cpu", ">=2.11,<2.14"), _fits("2.9", ">=2.11"), _fits("0.11.0", "==0.11.0")
    (True, False, True)
    """
    have = _release(version)
    for part in filter(None, wanted.split(",")):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)([0-9.]+)", part)
        if match is None:
            continue
        bound = _release(match[2])
        order = (have > bound) - (have < bound)
        holds = {">=": order >= 0, "<=": order <= 0, "==": order == 0, "!=": order != 0, "<": order < 0, ">": order > 0}
        if not holds[match[1]]:
            return False
    return True


def _release(version: str) -> list[int]:
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[+a-zA-Z]", version, maxsplit=1)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def _devices() -> tuple[dict[str, Any], list[str]]:
    """Return cores, memory and GPUs, and why torch or torchtitan cannot be used, if they cannot."""
    devices: dict[str, Any] = {
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": [],
        "nvidia_driver": _driver(),
        "cuda_of_torch": None,
        "nccl": None,
    }
    wrong = []
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return devices, [f"torch cannot be imported ({type(error).__name__}: {error})"]
    devices["cuda_of_torch"] = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else None)
    if torch.cuda.is_available():
        devices["gpus"] = [
            {"name": gpu.name, "memory_gib": round(gpu.total_memory / GIB, 1), "capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        devices["nccl"] = _nccl(torch)
    try:
        importlib.import_module("blt_titan.titan")
    except Exception as error:
        wrong.append(f"torchtitan cannot be imported ({type(error).__name__}: {error})")
    if not torch.distributed.is_available():
        wrong.append("this build of torch has no torch.distributed")
    return devices, wrong


def _nccl(torch: Any) -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:  # a build without it
        return None


def _driver() -> str | None:
    """Return the version of the NVIDIA driver of the kernel, which is there whatever torch can use."""
    try:
        match = re.search(r"(\d+\.\d+[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return match[1] if match else None


def _without_their_gpu(devices: dict[str, Any]) -> Iterator[str]:
    if devices["nvidia_driver"] and not devices["gpus"]:
        why = "this build of torch has no CUDA" if devices["cuda_of_torch"] is None else "torch finds no GPU"
        yield (
            f"an NVIDIA driver ({devices['nvidia_driver']}) is here, but {why}: install a CUDA build of torch that the "
            "driver can run, https://pytorch.org/get-started"
        )
    if devices["gpus"] and devices["nccl"] is None:
        yield "training on several GPUs needs NCCL, which this build of torch lacks"


def _limits() -> tuple[dict[str, Any], list[str]]:
    """Return what the system allows, and where that is little."""
    soft, hard = (2**63 if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    limits: dict[str, Any] = {"open_files": soft, "shared_memory_gib": None, "free_disk_gib": None}
    tight = []
    if soft < LEAST_OPEN_FILES:
        more = f"ulimit -n {LEAST_OPEN_FILES}" if hard >= LEAST_OPEN_FILES else f"the hard limit is {hard}: ask root"
        tight.append(f"a process may open {soft} files; large data and many ranks need {LEAST_OPEN_FILES}: {more}")
    try:
        shared = shutil.disk_usage("/dev/shm").total
        limits["shared_memory_gib"] = round(shared / GIB, 2)
        limits["free_disk_gib"] = round(shutil.disk_usage(".").free / GIB, 1)
    except OSError:
        tight.append("/dev/shm is missing: loader workers and NCCL hand over memory there")
    else:
        if shared < LEAST_SHARED_BYTES:
            tight.append(
                f"/dev/shm has {shared / 2**20:.0f} MiB; loader workers and NCCL want {LEAST_SHARED_BYTES // GIB} GiB: "
                "docker run --shm-size=8g"
            )
    return limits, tight


if __name__ == "__main__":
    sys.exit(main())
