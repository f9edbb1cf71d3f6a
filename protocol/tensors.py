"""Named arrays <-> safetensors bytes. What arrives is hostile until it has passed `decode`."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

Tensors = Mapping[str, NDArray[Any]]
MAX_HEADER = 4 << 20


class TensorError(ValueError):
    """Bytes that are not an acceptable safetensors file."""


def encode(tensors: Tensors) -> bytes:
    """Serialise; the same arrays give the same bytes whatever their order."""
    return save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)})


def decode(data: bytes, max_bytes: int = 1 << 30) -> dict[str, NDArray[Any]]:
    """Parse safetensors bytes.

    Parameters
    ----------
    data : bytes
    max_bytes : int
        Longer input is refused before it is parsed.

    Raises
    ------
    TensorError
        With one line that says what is wrong.
    """
    if len(data) > max_bytes:
        raise TensorError(f"{len(data)} bytes of tensors, at most {max_bytes} wanted")
    if len(data) < 8:
        raise TensorError(f"{len(data)} bytes are too few for a safetensors file")
    header = int.from_bytes(data[:8], "little")
    if header > min(MAX_HEADER, len(data) - 8):
        raise TensorError(f"safetensors header of {header} bytes in a file of {len(data)}")
    try:
        json.loads(data[8 : 8 + header])
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TensorError(f"not a safetensors file: {error}") from error


def narrowed(tensors: Tensors) -> dict[str, NDArray[np.float16]]:
    """float16 of every tensor, for half the bytes on the way to a device; relative error at most 2^-11 above 6e-5.

    Raises
    ------
    TensorError
        A value beyond 65504.
    """
    small = {}
    for name, value in tensors.items():
        with np.errstate(over="ignore"):
            small[name] = np.asarray(value, np.float16)
        if not np.isfinite(small[name]).all():
            raise TensorError(f"{name}: too large for float16")
    return small


def widened(tensors: Tensors) -> dict[str, NDArray[np.float32]]:
    """float32 of float16 tensors; raises TensorError when one is of another type.

    >>> widened(narrowed({"a": np.array([0.1])}))["a"].tolist()
    [0.0999755859375]
    """
    for name, value in tensors.items():
        if value.dtype != np.float16:
            raise TensorError(f"{name[:80]}: {value.dtype} found, float16 wanted")
    return {name: value.astype(np.float32) for name, value in tensors.items()}


DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I64": np.int64}


def mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a file as read-only views over its mapping: memory that the system can drop and read again.

    Raises
    ------
    TensorError
        No file, not safetensors, or a dtype that is not ours.
    """
    try:
        with safe_open(str(path), framework="numpy"):
            pass  # checks the header: names, ranges, sizes
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(memory[:8], "little")
        header = json.loads(memory[8:start])
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
            offset = start + entry["data_offsets"][0]
            flat = np.frombuffer(memory, dtype, math.prod(shape), offset)
            arrays[name] = flat.reshape(shape)
        return arrays
    except OSError as error:
        raise TensorError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TensorError(f"{path}: not a safetensors file of ours: {error}") from error
