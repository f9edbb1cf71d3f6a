"""Fast `packing.quantize`, bit for bit: torch over blocks of rows that stay in the cache, all formats in one pass.

Letters: O output features, I input features, n groups of a block, G group size.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol import packing
from protocol.packing import FINE, GROUP, NF4, SHRINK

BLOCK = 1 << 17  # weights at a time: with its temporaries about a core's L2 cache
_VALUES = torch.from_numpy(NF4)
# NF4's levels are 0.08 apart or more: a cell of 1/128 holds one border between two codes at most.
_CELLS = 257


def _cells(exact: Tensor) -> Tensor:
    """The cell of each value, int32 in 0..256; a larger value is never in an earlier cell."""
    return exact.add(1).mul_(128).clamp_(0, _CELLS - 1).int()


def _table() -> tuple[Tensor, Tensor]:
    """Per cell: the code of values up to its border, and the border."""
    borders = torch.from_numpy((NF4[1:] + NF4[:-1]) / 2)
    cells, border = _cells(borders), torch.full((_CELLS,), torch.inf)
    border[cells] = borders
    code = (cells.unsqueeze(0) < torch.arange(_CELLS).unsqueeze(1)).sum(1)
    return code.to(torch.int8), border


_CODE, _BORDER = _table()


@dataclass(frozen=True)
class Packed:
    """A weight in one format, and the squared error of all its elements together."""

    packed: NDArray[np.uint8]  # [O, I / 2] or [O, I]
    scale: NDArray[np.float16]  # [O, I / G]
    squared_error: float


class _Buffers(threading.local):
    """A thread's temporaries of one block; allocating them anew would cost more than computing."""

    def __init__(self) -> None:
        self.weight = torch.empty(BLOCK)
        self.level = torch.empty(BLOCK)
        self.other = torch.empty(BLOCK)
        self.code = torch.empty(BLOCK, dtype=torch.int8)


_buffers = _Buffers()


def quantize(weight: Tensor, formats: Sequence[str]) -> tuple[dict[str, Packed], float]:
    """Pack a matrix in several formats.

    Parameters
    ----------
    weight : tensor [O, I]
        Of any float type; never converted as a whole.

    Returns
    -------
    dict of format -> Packed
    float
        Sum of the squared weights.

    Raises
    ------
    ValueError
        As `packing.quantize`.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"{columns} input features are not a multiple of the group of {GROUP}")
    packed = {
        f: torch.empty(rows, packing.packed_bytes(f, 1, columns), dtype=torch.uint8)
        for f in formats
    }
    scales = {f: torch.empty(rows, columns // GROUP, dtype=torch.float16) for f in formats}
    errors, total = dict.fromkeys(formats, 0.0), 0.0
    # A very wide matrix has blocks of one row.
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step]
        x = _take(_buffers.weight, block.numel()).view(block.shape).copy_(block).view(-1, GROUP)
        most, least = x.amax(-1), x.amin(-1)
        if not (torch.isfinite(most).all() and torch.isfinite(least).all()):
            raise ValueError("weight holds NaN or infinity")
        flat = x.view(-1)
        total += float(torch.dot(flat, flat))
        for format in formats:
            scale, level = _PACK[format](
                x, most, least, packed[format][start : start + step].view(-1)
            )
            scales[format][start : start + step] = scale.view(block.shape[0], -1)
            difference = level.mul_(scale.float().unsqueeze(-1)).sub_(x).view(-1)
            errors[format] += float(torch.dot(difference, difference))
    return {f: Packed(packed[f].numpy(), scales[f].numpy(), errors[f]) for f in formats}, total


def _take(buffer: Tensor, count: int) -> Tensor:
    return buffer[:count] if count <= buffer.numel() else buffer.new_empty(count)


def _half(scale: Tensor) -> Tensor:
    half = scale.half()
    if not torch.isfinite(half).all():
        raise ValueError("weight is too large for a float16 scale")
    return half


def _divide(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    divisor = scale.float().clamp_(min=2.0**-24).unsqueeze(-1)
    return torch.div(x, divisor, out=_take(out, x.numel()).view(x.shape))


def _nibbles(code: Tensor, out: Tensor) -> None:
    """Two codes of `code` [2 m] in each byte of `out` [m], the first in the high half."""
    # As little-endian pairs the first code is the low byte: move it up four bits, and the second down four.
    pair = code.view(torch.int16)
    out.copy_((pair << 4) | (pair >> 8))


def _int4(x: Tensor, most: Tensor, least: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill `out`; the scales [n] and the levels [n, G]."""
    widest = _half(torch.maximum(most / 7, least / -8))
    best, smallest = widest, torch.full_like(most, torch.inf)
    for factor in SHRINK:
        scale = (widest.float() * factor).half()
        exact = _divide(x, scale, _buffers.level)
        level = torch.round(exact, out=_take(_buffers.other, x.numel()).view(x.shape)).clamp_(-8, 7)
        fine = exact.sub_(level).clamp_(-2.5, 2.5).mul_(FINE).round_()
        wide = scale.float()
        error = fine.mul_(fine).sum(-1).mul_(wide).mul_(wide)
        best = torch.where(error < smallest, scale, best)
        smallest = torch.minimum(smallest, error)
    level = _divide(x, best, _buffers.level).round_().clamp_(-8, 7)
    _nibbles(_take(_buffers.code, x.numel()).copy_(level.view(-1)).add_(8), out)
    return best, level


def _nf4(x: Tensor, most: Tensor, least: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The same; a level is a value of NF4."""
    scale = _half(torch.maximum(most, -least))
    exact = _divide(x, scale, _buffers.level).view(-1)
    cell = _cells(exact)
    code = _CODE.index_select(0, cell).add_(exact > _BORDER.index_select(0, cell))
    _nibbles(code, out)
    return scale, _VALUES.index_select(0, code.int()).view(x.shape)


def _int8(x: Tensor, most: Tensor, least: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The same."""
    scale = _half(torch.maximum(most, -least) / 127)
    level = _divide(x, scale, _buffers.level).round_().clamp_(-127, 127)
    # Adding 128 to a signed byte and turning its top bit are the same.
    torch.bitwise_xor(out.view(torch.int8).copy_(level.view(-1)), -128, out=out.view(torch.int8))
    return scale, level


_PACK: dict[str, Any] = {"int4": _int4, "nf4": _nf4, "int8": _int8}
