"""What the tests of strangers' files begin from."""

from pathlib import Path

import pytest

from blt_titan.data.prepare.job import prepare
from blt_titan.hf.export import export_hf, stored_weights
from tests.helpers.hf_models import write_checkpoints
from tests.helpers.original_weights import write_original


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """Checkpoints `blt` and `entropy`, a directory `hf` of both, one of the original's layout, and shards.

    To be copied, not changed.
    """
    folder = write_checkpoints(tmp_path_factory.mktemp("sound"))
    export_hf(stored_weights(folder / "blt"), folder / "hf", entropy=stored_weights(folder / "entropy"))
    write_original(folder / "original")
    (folder / "text.txt").write_text("to be, or not to be, that is the question\n" * 20)
    prepare([folder / "text.txt"], folder / "data", validation_fraction=0, seed=0, progress=False)
    return folder
