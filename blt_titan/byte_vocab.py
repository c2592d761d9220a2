"""The vocabulary: four special ids, then the 256 bytes.

>>> ids = document_ids(b"Hi")
>>> ids.tolist()
[1, 76, 109, 2]
>>> ids_to_bytes(ids)
b'Hi'
"""

import numpy as np

BOUNDARY_ID = 0  # also the padding id; the released models call it BOE
BOS_ID = 1
EOS_ID = 2
RESERVED_ID = 3  # the released models reserve it for a BPE delimiter
BYTE_OFFSET = 4
VOCAB_SIZE = BYTE_OFFSET + 256
NEWLINE_ID = BYTE_OFFSET + ord("\n")


def bytes_to_ids(text: bytes) -> np.ndarray:
    """Map N bytes to ids, int16 [N], without special ids."""
    return np.frombuffer(text, dtype=np.uint8).astype(np.int16) + BYTE_OFFSET


def document_ids(text: bytes) -> np.ndarray:
    """Map a document of N bytes to BOS, its bytes, EOS: int16 [N + 2]."""
    ids = np.empty(len(text) + 2, dtype=np.int16)
    ids[0], ids[-1] = BOS_ID, EOS_ID
    ids[1:-1] = bytes_to_ids(text)
    return ids


def ids_to_bytes(ids: np.ndarray) -> bytes:
    """Map ids back to bytes, leaving special ids out."""
    ids = np.asarray(ids)
    return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()
