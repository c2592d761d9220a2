from pathlib import Path

import pytest

from blt_titan.data.store.manifest import read_manifest
from tests.helpers.shard_files import random_documents, write


@pytest.fixture
def three_shards(tmp_path) -> Path:
    write(tmp_path, random_documents(60, 200), shard_bytes=5000)
    assert len(read_manifest(tmp_path).splits["train"]) >= 3
    return tmp_path
