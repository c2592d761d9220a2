"""What the operators ask of their inputs, said in sentences before anything is launched."""

import torch


def summing_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that scores and sums are made in: fp32 at least, fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_first(name: str, argument: str, first_BP1: torch.Tensor, n_rows: int) -> None:
    """Raise a ValueError if offsets are not int32 [n_rows, P + 1]."""
    if first_BP1.dtype != torch.int32 or first_BP1.ndim != 2 or len(first_BP1) != n_rows or first_BP1.shape[1] < 2:
        raise ValueError(
            f"{name}: {argument} must be int32 [{n_rows}, P + 1] with P at least 1, got {first_BP1.dtype} "
            f"{tuple(first_BP1.shape)}"
        )


def check_shapes(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **indices: torch.Tensor) -> None:
    """Raise a ValueError if inputs of a cross-attention do not fit each other.

    Args:
        name: of the operator, for the message.
        q: queries; of bytes [B, S, H, K] or of slots of patches [B, P, N, H, K].
        k: keys, of the other side.
        v: values, as keys.
        indices: by argument name, offsets [B, P + 1] and whatever else is [B, S], all int32.
    """
    slots, byte = (q, k) if q.ndim == 5 else (k, q)
    given = f"got queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
    if byte.ndim != 4 or slots.ndim != 5:
        raise ValueError(f"{name}: bytes must be [B, S, H, K] and slots of patches [B, P, N, H, K], {given}")
    (B, S, H, K), (B2, P, _, H2, K2) = byte.shape, slots.shape
    if (B, H, K) != (B2, H2, K2) or v.shape != k.shape:
        raise ValueError(f"{name}: rows, heads and head size must agree, and values be shaped as keys, {given}")
    dtypes = [x.dtype for x in (q, k, v)]
    if len(set(dtypes)) > 1 or not q.is_floating_point():
        raise ValueError(f"{name}: queries, keys and values must share a floating dtype, got {dtypes}")
    for argument, index in indices.items():
        shape = (B, P + 1) if argument.endswith("BP1") else (B, S)
        if index.dtype != torch.int32 or index.shape != shape:
            raise ValueError(f"{name}: {argument} must be int32 {shape}, got {index.dtype} {tuple(index.shape)}")
