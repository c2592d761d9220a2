"""The way in: make a dry run in a process of its own, and return what it found.

A process of its own, because the stubs must be there before torch is loaded, and because torch.cuda is another one
afterwards. The caller's process is left as it is.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import tomli_w
import torch

from blt_titan.config.check import check_run
from blt_titan.config.effective import effective_settings
from blt_titan.config.rules.parallel import compiled_tensor_parallel
from blt_titan.config.rules.target import CARD, CPU, Target
from blt_titan.config.run_config import RunConfig
from blt_titan.dry_run.errors import DryRunError, NoCudaBuildError
from blt_titan.dry_run.result import DryRun
from blt_titan.dry_run.stubs import load_path, stub_environment

__all__ = ["DryRun", "DryRunError", "dry_run"]


def dry_run(
    config: RunConfig,
    world_size: int,
    gpu: str = "h100",
    *,
    name: str = "",
    kernels: bool = True,
    quiet: bool = False,
    rank: int | None = None,
    device: str = "cuda",
    target: Target = CARD,
) -> DryRun:
    """Make one training step of a run on tensors without data.

    Args:
        config: settings, as `load_run_config` returns them; data and checkpoints are not looked at.
        world_size: ranks of the whole job.
        gpu: a key of `cards.CARDS`.
        name: what the run is called in what is said.
        kernels: also generate and assemble kernels, which takes minutes, and estimate times.
        quiet: say nothing on standard error.
        rank: whose step is made; None for the one in the middle of those that share the first row.
        device: "cuda"; or "cpu", which any build of torch can: the memory and collectives of a run on CPUs, without
            kernels, and nearly those of one on GPUs; uncompiled where torch compiles such a layout for GPUs alone, and
            then more memory.
        target: what settings are checked for.

    Raises:
        RunConfigError: the settings are not sound on so many ranks.
        NoCudaBuildError: the torch of this Python is no CUDA build, and device is "cuda".
        DryRunError: the step cannot be made here.
    """
    if device == "cuda":
        check_cuda_build()
    check_run(config, world_size=world_size, verify_data=False, look_at_disk=False, target=target)
    if config.training.enable_cpu_offload:
        raise DryRunError("training.enable_cpu_offload = true: a dry run sees no copies to host memory; give false")
    with tempfile.TemporaryDirectory(prefix="blt-titan-") as folder:
        settings, request, answer = (Path(folder, file) for file in ("run.toml", "request.json", "answer.json"))
        table = effective_settings(config)
        if device == "cpu" and any(compiled_tensor_parallel(config, CPU)):
            table["compile"]["enable"] = False
            if not quiet:
                print(
                    "check-cuda: eager, as torch cannot compile this layout for a CPU: more memory than on a GPU",
                    file=sys.stderr,
                )
        settings.write_text(tomli_w.dumps(table), encoding="utf-8")
        asked = {
            "config": str(settings),
            "world_size": world_size,
            "gpu": gpu,
            "name": name or config.job.description,
            "kernels": kernels and device == "cuda",
            "rank": rank,
            "device": device,
            "answer": str(answer),
        }
        stubs = stub_environment() if device == "cuda" else dict(os.environ)
        environment = stubs | {"LOCAL_RANK": "0", "RANK": "0", "TOKENIZERS_PARALLELISM": "false"}
        request.write_text(json.dumps(asked | ({"stub": load_path()} if device == "cuda" else {})), encoding="utf-8")
        said = _call(request, environment, quiet)
        if not answer.exists():
            raise DryRunError(said)
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise DryRunError(found["error"])
    return DryRun.from_json(found["result"])


def check_cuda_build() -> None:
    """Raise NoCudaBuildError unless this Python's torch is a CUDA build."""
    if torch.version.cuda is None:
        raise NoCudaBuildError(str(torch.__version__))


def _call(request: Path, environment: dict[str, str], quiet: bool) -> str:
    """Run the worker; return what to say if it has left no answer."""
    command = [sys.executable, "-m", "blt_titan.dry_run.worker", str(request)]
    kept = Path(request.parent, "errors.txt")
    with kept.open("w+") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                errors.write(line)
                if line.startswith("check-cuda: ") and not quiet:
                    print(line, end="", file=sys.stderr, flush=True)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip() and not line.startswith("check-cuda: ")]
    if code < 0:
        return f"the dry run was ended by {signal.Signals(-code).name}; memory may have run out"
    if os.environ.get("BLT_TITAN_TRACEBACK"):
        print(*lines, sep="\n", file=sys.stderr)
    return f"the step could not be made: {(lines or ['nothing was said'])[-1][:500]}"
