"""Named arrays <-> safetensors bytes. What arrives is hostile until it has passed `decode`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Tensors = Mapping[str, NDArray[Any]]
MAX_HEADER = 4 << 20


class TensorError(ValueError):
    """Bytes that are not an acceptable safetensors file."""


def encode(tensors: Tensors) -> bytes:
    """Serialise; the same arrays give the same bytes whatever their order."""
    return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})


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
