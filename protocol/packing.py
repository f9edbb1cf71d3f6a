"""Packed layouts of frozen weights: group-wise along the input, one float16 scale per group.

Letters: O output features, I input features, G group size (divides I).

format  bytes of a row  value
int4    I / 2           scale * (nibble - 8), the even column in the high nibble; scale = max(max w / 7, -min w / 8),
                        or that times one of SHRINK where it loses less
nf4     I / 2           scale * NF4[nibble], nibbles alike; scale = max|w| (QLoRA, Dettmers et al. 2023)
int8    I               scale * (byte - 128), bytes 1..255; scale = max|w| / 127
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32
FORMATS = ("int4", "nf4", "int8")
BITS = {"int4": 4, "nf4": 4, "int8": 8}
SHRINK = (1.0, 0.92, 0.84)
"""Cutting off the largest weights of a group can cost less than coarser levels for all: see docs/experiments.md."""
FINE = 256
"""Errors are compared in this fraction of a level, as whole numbers: their sums are exact in any order of summing, so
that every machine and every implementation packs the same bytes."""
# Quantiles of a normal distribution, scaled to [-1, 1] and with an exact zero; values as in bitsandbytes.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def packs(shape: tuple[int, ...]) -> bool:
    """Whether a dense tensor of this shape is stored packed: a matrix whose input is a multiple of the group.

    >>> packs((10, 64)), packs((10, 65)), packs((64,))
    (True, False, False)
    """
    return len(shape) == 2 and shape[1] % GROUP == 0


def packed_bytes(format: str, out: int, features: int) -> int:
    """Bytes of the packed part of a weight [O, I].

    >>> packed_bytes("int4", 3, 64), packed_bytes("int8", 3, 64)
    (96, 192)
    """
    return out * features * BITS[format] // 8


def quantize(
    weight: NDArray[Any], format: str = "int4", group: int = GROUP
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Round to the nearest level of each group. The definition; `export.quantize` is the fast way to the same bytes.

    Parameters
    ----------
    weight : float array [O, I]
    group : int
        G; I must be a multiple of it, and even.

    Returns
    -------
    packed : uint8 [O, I / 2] or [O, I]
    scale : float16 [O, I / G]

    Raises
    ------
    ValueError
        When I is not a multiple of `group`, or a weight is not finite or too large for a float16 scale.

    Examples
    --------
    >>> packed, scale = quantize(np.array([[7.0, -8.0, 0.0, 1.0]]), group=4)
    >>> packed.tolist(), scale.tolist()
    ([[240, 137]], [[1.0]])
    """
    rows, columns = weight.shape
    if columns % group or columns % 2:
        raise ValueError(f"{columns} input features are not a multiple of the group of {group}")
    groups = np.asarray(weight, dtype=np.float32).reshape(rows, columns // group, group)
    codes: NDArray[Any]
    most, least = groups.max(-1), groups.min(-1)
    if not (np.isfinite(most).all() and np.isfinite(least).all()):
        raise ValueError("weight holds NaN or infinity")
    # Scales are rounded to their stored precision first, so that levels are chosen for what will be read back.
    if format == "int4":
        scale = _half(np.maximum(most / np.float32(7), -least / np.float32(8)))
        scale = _least_error(groups, scale)
        codes = _levels(groups, scale, -8, 7) + 8
    elif format == "nf4":
        scale = _half(np.maximum(most, -least))
        codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, groups / _divisor(scale))
    else:
        scale = _half(np.maximum(most, -least) / np.float32(127))
        codes = _levels(groups, scale, -127, 127) + 128
    flat: NDArray[np.uint8] = codes.astype(np.uint8).reshape(rows, columns)
    if format != "int8":
        flat = np.left_shift(flat[:, 0::2], 4) | flat[:, 1::2]
    return flat, scale


def _half(scale: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("weight is too large for a float16 scale")
    return half


def _divisor(scale: NDArray[np.float16]) -> NDArray[np.float32]:
    """What to divide the group of each scale by, [..., 1]; no zero."""
    return np.maximum(scale.astype(np.float32), np.float32(2.0**-24))[..., None]


def _levels(
    groups: NDArray[np.float32], scale: NDArray[np.float16], low: int, high: int
) -> NDArray[np.float32]:
    """The nearest level of each weight; halves go to the even one."""
    nearest: NDArray[np.float32] = np.rint(groups / _divisor(scale))
    return nearest.clip(np.float32(low), np.float32(high))


def _least_error(groups: NDArray[np.float32], widest: NDArray[np.float16]) -> NDArray[np.float16]:
    """Of the scales `widest` * SHRINK [O, I / G], the one with the least squared int4 error, the wider of equals."""
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for factor in SHRINK:
        scale = (widest.astype(np.float32) * np.float32(factor)).astype(np.float16)
        exact = groups / _divisor(scale)
        off = np.clip(exact - _levels(groups, scale, -8, 7), np.float32(-2.5), np.float32(2.5))
        fine = np.rint(off * np.float32(FINE))
        error = (fine * fine).sum(-1) * scale.astype(np.float32) * scale.astype(np.float32)
        best = np.where(error < least, scale, best)
        least = np.minimum(least, error)
    return best


def dequantize(
    packed: NDArray[np.uint8], scale: NDArray[Any], format: str = "int4"
) -> NDArray[np.float32]:
    """Inverse of `quantize` up to half a level; float32 [O, I].

    >>> dequantize(np.array([[241, 137]], np.uint8), np.array([[1.0]], np.float16)).tolist()
    [[7.0, -7.0, 0.0, 1.0]]
    """
    if format == "int8":
        levels = packed.astype(np.float32) - 128
    else:
        codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
        codes[:, 0::2] = packed >> 4
        codes[:, 1::2] = packed & 15
        levels = NF4[codes] if format == "nf4" else codes.astype(np.float32) - 8
    groups = levels.reshape(packed.shape[0], scale.shape[1], -1)
    return (groups * scale.astype(np.float32)[..., None]).reshape(levels.shape)
