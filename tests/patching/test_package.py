"""The package as a whole: doctests, speed, and no waiting for the device."""

import doctest
import time

import numpy as np
import pytest
import torch

from blt_titan.byte_vocab import bytes_to_ids
from blt_titan.patching import entropy, entropy_patch_starts, limits, patch_lengths, rule_patch_starts, text

DOCUMENT_BYTES = 10_000_000
# Measured 0.3 s (numpy) and 0.4 s (torch) on two slow cores; a Python loop over 10 MB takes seconds.
TIME_LIMIT_S = 1.0


@pytest.mark.parametrize("module", [entropy, limits, text], ids=lambda module: module.__name__)
def test_doctests(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("to_kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("what", ["space", "entropy"])
def test_a_10_mb_document_takes_less_than_a_second(to_kind, what):
    rng = np.random.default_rng(0)
    if what == "space":
        ids = to_kind(bytes_to_ids(rng.choice(np.frombuffer(b"etaoin  .", dtype=np.uint8), DOCUMENT_BYTES)))
        call = lambda: rule_patch_starts(ids, rule="space", max_patch_bytes=512)
    else:
        h = to_kind(rng.random(DOCUMENT_BYTES, dtype=np.float32) * 2)
        call = lambda: patch_lengths(h, threshold=1.335, max_patch_bytes=512)
    seconds = []
    for _ in range(3):
        begin = time.process_time()  # and not the clock on the wall: other processes share the cores
        call()
        seconds.append(time.process_time() - begin)
    assert min(seconds) < TIME_LIMIT_S


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run scripts/gpu_check.sh on one")
def test_masks_never_wait_for_the_device():
    h = torch.rand(1000, device="cuda")
    ids = torch.randint(0, 260, (1000,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = [
            entropy_patch_starts(h, rule=rule, max_patch_bytes=7, **options)
            for rule, options in {
                "global": {"threshold": 0.5},
                "monotonic": {"threshold": 0.5},
                "add": {"threshold": 0.5, "threshold_add": 0.1},
                "topk": {"patch_size": 4},
            }.items()
        ]
        masks += [
            rule_patch_starts(ids, rule=rule, stride=stride, max_patch_bytes=7)
            for rule, stride in [("space", None), ("static", 4), ("byte", None)]
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(mask.device == h.device for mask in masks)
