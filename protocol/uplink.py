"""The change since the lease, packed into eight or four bits per value for the uplink.

A device sends `new value - leased value` of everything it trained: two flat arrays, whatever the number of tensors,
because a safetensors header of a hundred bytes per small tensor would cost more than the coding saves.

    change.codes    uint8   int8: a byte a value; int4: two values a byte (layouts of `protocol.packing`)
    change.scales   float16 one a group of GROUP values, in units of UNIT

Order: tensors of one role (their name without its numbers) follow one another by name, and a role is filled up with
zeros to whole groups. So a group never mixes factors with router rows, whose changes differ by a factor of ten.
Rounding is to the nearest level, always: the same change gives the same bytes, and what rounding loses is the sender's
to carry over (`edge/feedback.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from protocol import packing
from protocol.tensors import TensorError, Tensors

Kind = Literal["int8", "int4"]
KINDS: tuple[Kind, ...] = ("int8", "int4")
GROUP = 64
UNIT = 2.0**-10
"""Scales in units of this: a router row moves by 1e-4, and a float16 scale of 1e-6 would keep only four bits."""
CODES, SCALES = "change.codes", "change.scales"
Shapes = Mapping[str, tuple[int, ...]]
_NUMBERS = re.compile(r"\d+")


def role(name: str) -> str:
    """A name without its numbers.

    >>> role("layers.3.experts.17.down.lora_A")
    'layers..experts..down.lora_A'
    """
    return _NUMBERS.sub("", name)


def _runs(names: Mapping[str, Any]) -> Iterator[list[str]]:
    """The names of each role, in the order of the wire."""
    for _, run in groupby(sorted(names, key=lambda name: (role(name), name)), role):
        yield list(run)


def groups(shapes: Shapes) -> int:
    """Number of groups that tensors of these shapes fill.

    >>> groups({"layers.0.router.1": (40,), "layers.0.router.2": (40,), "layers.0.experts.1.up.lora_A": (1, 3)})
    3
    """
    return sum(-(-sum(math.prod(shapes[n]) for n in run) // GROUP) for run in _runs(shapes))


def coded_bytes(shapes: Shapes, kind: Kind) -> int:
    """Bytes of the codes and the scales.

    >>> coded_bytes({"a": (64,)}, "int8"), coded_bytes({"a": (64,)}, "int4")
    (66, 34)
    """
    return groups(shapes) * (GROUP * packing.BITS[kind] // 8 + 2)


def encode(change: Tensors, kind: Kind) -> dict[str, NDArray[Any]]:
    """Code named changes.

    Parameters
    ----------
    change : name -> float array of any shape, new value less leased value
    kind : "int8" | "int4"

    Returns
    -------
    `change.codes` uint8 [bytes] and `change.scales` float16 [groups]

    Raises
    ------
    TensorError
        A change that is not finite, or beyond what a scale can say (about 440 in int4, 8000 in int8).

    Notes
    -----
    A value is off by at most half a level. In int4 a group may get a smaller scale and lose its peak where that lowers
    the squared error of the group (`packing.SHRINK`).
    """
    pieces = []
    for run in _runs(change):
        flat = np.concatenate([np.asarray(change[n], np.float32).reshape(-1) for n in run])
        pieces.append(np.pad(flat, (0, -flat.size % GROUP)))
    values = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = (values / np.float32(UNIT)).reshape(-1, GROUP)
        codes, scales = packing.quantize(rows, kind, GROUP)
    except ValueError as error:
        line = str(error).replace("weight", "change")
        raise TensorError(f"a change that cannot be coded in {kind}: {line}") from error
    return {CODES: codes.reshape(-1), SCALES: scales.reshape(-1)}


def decode(coded: Tensors, shapes: Shapes, kind: Kind) -> dict[str, NDArray[np.float32]]:
    """Inverse of `encode` up to its rounding; what comes in is hostile until it has passed.

    Parameters
    ----------
    coded : what `encode` gave, and nothing else
    shapes : name -> shape of every tensor, known to both sides from the lease

    Raises
    ------
    TensorError
        Other names, dtypes or sizes than these shapes ask for; a scale that is negative, NaN or infinite.

    Examples
    --------
    >>> change = {"layers.0.router.2": np.array([0.5, -1.27, 0.0], np.float32)}
    >>> got = decode(encode(change, "int8"), {"layers.0.router.2": (3,)}, "int8")
    >>> got["layers.0.router.2"].round(3).tolist()
    [0.5, -1.2699999809265137, 0.0]
    """
    if kind not in KINDS:
        raise TensorError(f"coding {str(kind)[:20]!r}, one of {', '.join(KINDS)} wanted")
    if strange := set(coded) ^ {CODES, SCALES}:
        name = min(strange)
        found = "extra" if name in coded else "missing"
        raise TensorError(f"{kind} update: tensor {name[:80]!r} is {found}")
    count = groups(shapes)
    per_group = GROUP * packing.BITS[kind] // 8
    for name, dtype, size in ((CODES, np.uint8, count * per_group), (SCALES, np.float16, count)):
        value = coded[name]
        if value.dtype != dtype or value.shape != (size,):
            wanted = f"{np.dtype(dtype)} ({size},) wanted"
            raise TensorError(f"{kind} update: {name} is {value.dtype} {value.shape}, {wanted}")
    scales = coded[SCALES].reshape(-1, 1)
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise TensorError(f"{kind} update: {SCALES} holds NaN, infinity or a negative number")
    if not count:
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    rows = packing.dequantize(coded[CODES].reshape(-1, per_group), scales, kind)
    values = (rows * np.float32(UNIT)).reshape(-1)
    decoded: dict[str, NDArray[np.float32]] = {}
    at = 0
    for run in _runs(shapes):
        for name in run:
            size = math.prod(shapes[name])
            decoded[name] = values[at : at + size].reshape(shapes[name])
            at += size
        at = -(-at // GROUP) * GROUP
    return decoded


def seen_by_server(change: Tensors, kind: Kind) -> dict[str, NDArray[np.float32]]:
    """What arrives of a change: `decode(encode(change))`."""
    return decode(encode(change, kind), {n: v.shape for n, v in change.items()}, kind)
