"""The packed 4-bit layout of expert weights: symmetric, group-wise along the input, two columns to a byte.

Letters: O output features, I input features, G group size (divides I).
The even column is in the high nibble, as ExecuTorch's `embedding_4bit` reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32
ZERO = 8  # stored nibble = value + 8, values -8..7


def quantize(
    weight: NDArray[Any], group: int = GROUP
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Round to the nearest of 16 levels per group.

    Parameters
    ----------
    weight : float array [O, I]
    group : int
        G; I must be a multiple of it, and even.

    Returns
    -------
    packed : uint8 [O, I / 2]
    scale : float16 [O, I / G]

    Raises
    ------
    ValueError
        When I is not a multiple of `group` or the weight is not finite.

    Examples
    --------
    >>> packed, scale = quantize(np.array([[7.0, -7.0, 0.0, 1.0]]), group=4)
    >>> packed.tolist(), scale.tolist()
    ([[241, 137]], [[1.0]])
    """
    rows, columns = weight.shape
    if columns % group or columns % 2:
        raise ValueError(f"{columns} input features are not a multiple of the group of {group}")
    groups = np.asarray(weight, dtype=np.float32).reshape(rows, columns // group, group)
    if not np.isfinite(groups).all():
        raise ValueError("weight holds NaN or infinity")
    # The scale is rounded to its stored precision first, so that levels are chosen for what will be read back.
    scale = (np.abs(groups).max(-1) / 7).astype(np.float16)
    if not np.isfinite(scale).all():
        raise ValueError("weight is too large for a float16 scale")
    safe = np.maximum(scale.astype(np.float32), np.float32(2.0**-24))[..., None]
    levels = np.clip(np.rint(groups / safe), -8, 7) + ZERO
    flat = levels.astype(np.uint8).reshape(rows, columns)
    return (flat[:, 0::2] << 4) | flat[:, 1::2], scale


def dequantize(packed: NDArray[np.uint8], scale: NDArray[Any]) -> NDArray[np.float32]:
    """Inverse of `quantize` up to half a level; float32 [O, I].

    >>> dequantize(np.array([[241, 137]], np.uint8), np.array([[1.0]], np.float16)).tolist()
    [[7.0, -7.0, 0.0, 1.0]]
    """
    rows, half = packed.shape
    levels = np.empty((rows, half * 2), dtype=np.float32)
    levels[:, 0::2] = packed >> 4
    levels[:, 1::2] = packed & 15
    groups = (levels - ZERO).reshape(rows, scale.shape[1], -1)
    return (groups * scale.astype(np.float32)[..., None]).reshape(rows, half * 2)
