"""A safetensors file written in pieces, in any order and from several threads, of any size: its bytes are those of
`tensors.encode`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.blob_store import BlobStore, Part
from protocol.manifest import Blob

_CODES = {"float32": "F32", "float16": "F16", "uint8": "U8"}


class TensorFile:
    """Shapes are known first, values follow.

    Parameters
    ----------
    specs : mapping of name -> (shape, dtype)
        `dtype` float32, float16 or uint8.
    """

    def __init__(self, store: BlobStore, specs: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self.store, self._specs = store, dict(specs)
        self._offset: dict[str, int] = {}
        header, end = {}, 0
        # The order that keeps every tensor aligned: wide types first.
        for name in sorted(specs, key=lambda n: (-np.dtype(specs[n][1]).itemsize, n)):
            shape, dtype = specs[name]
            begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._offset[name] = begin
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._lock = threading.Lock()
        self._part = Part(store.folder)
        self._part.write(len(text).to_bytes(8, "little") + text, 0)
        self._left = {name: int(np.prod(shape)) for name, (shape, _) in specs.items()}

    def write(self, name: str, value: NDArray[Any], first: int = 0) -> None:
        """Rows `first`, `first` + 1, ... of a tensor; each once."""
        shape, dtype = self._specs[name]
        assert value.dtype == dtype
        assert value.shape[1:] == tuple(shape[1:])
        row = int(np.prod(shape[1:])) * value.itemsize
        at = self._start + self._offset[name] + first * row
        self._part.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data, at)
        with self._lock:
            self._left[name] -= value.size

    def finish(self) -> Blob:
        """The blob, when everything has been written."""
        assert not any(self._left.values()), [name for name, left in self._left.items() if left]
        return self.store.put_part(self._part)

    def close(self) -> None:
        """Release the file."""
        self._part.close()
