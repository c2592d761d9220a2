"""Why a dry run cannot be made."""

HOW_TO_MAKE_A_VENV = (
    "it takes a venv of its own of about 6 GB, on Python 3.12: python3.12 -m venv .venv-cuda; "
    ".venv-cuda/bin/pip install torch==2.13.0 'blt_titan[check-cuda]' (of pip's own index, where Linux has the CUDA "
    "build); in a checkout of the sources: make check-cuda"
)


class DryRunError(RuntimeError):
    """A dry run that cannot be made here, or not of this run; the message is a sentence for the user."""


class NoCudaBuildError(DryRunError):
    """The torch of this Python is no CUDA build."""

    def __init__(self, version: str):
        super().__init__(f"torch {version} is no CUDA build, and check-cuda needs one; {HOW_TO_MAKE_A_VENV}")
