"""The two C stubs that let torch run autograd over CUDA tensors without a driver, compiled once into a cache folder.

In: nothing but gcc. Out: the environment of a process whose torch finds them. They must be there before torch is
loaded, which is why a dry run is a process of its own.
"""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from blt_titan.dry_run.errors import DryRunError

_HERE = Path(__file__).parent
_LIBRARIES = {
    "device_count.c": ("libdevice_count.so", []),
    "driver.c": ("libcuda.so.1", ["-Wl,-soname,libcuda.so.1"]),
}
"""Source: the library made of it, and what the linker must know."""


def stub_environment() -> dict[str, str]:
    """Return this process's environment with the stubs in it, for a process in which torch shall find them.

    Raises:
        DryRunError: gcc is missing or failed, or the cache folder cannot be written.
    """
    folder = _compiled()
    preloaded = [str(folder / "libdevice_count.so"), os.environ.get("LD_PRELOAD", "")]
    libraries = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {
        "LD_PRELOAD": " ".join(filter(None, preloaded)),
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        # A GPU that happens to be here is none of a dry run's business.
        "CUDA_VISIBLE_DEVICES": "",
    }


def load_path() -> str:
    """Return the path of the library that counts devices."""
    return str(_folder() / "libdevice_count.so")


def _folder() -> Path:
    digest = hashlib.sha256(b"".join((_HERE / name).read_bytes() for name in sorted(_LIBRARIES))).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "blt_titan" / f"dry_run-{digest}"


def _compiled() -> Path:
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source, (library, flags) in _LIBRARIES.items():
            if (folder / library).exists():
                continue
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                made = Path(partial) / library
                subprocess.run(
                    ["gcc", "-shared", "-fPIC", "-O1", "-o", str(made), str(_HERE / source), *flags],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                os.replace(made, folder / library)
    except FileNotFoundError as error:
        raise DryRunError("gcc is missing, which makes two stubs of a few lines of C: apt install gcc") from error
    except subprocess.CalledProcessError as error:
        raise DryRunError(f"gcc could not make a stub in {folder}: {' '.join(error.stderr.split())[:300]}") from error
    except OSError as error:
        raise DryRunError(f"{folder}: {error.strerror}; XDG_CACHE_HOME may name another folder") from error
    return folder
