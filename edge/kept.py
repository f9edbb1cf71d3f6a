"""What a device keeps between the leases of one run: residuals, control variates, its own factors and output scales.

One file in the work folder, `kept.safetensors`, replaced as a whole. Another run starts from nothing. Losing it costs
accuracy, never correctness, so a file that cannot be read is dropped with a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.session import FloatArrays
from protocol import tensors
from protocol.tensors import TensorError

log = logging.getLogger(__name__)
MAX_BYTES = 256 << 20
"""A device that trains other experts in every round would otherwise keep the whole adapter, sooner or later."""
_RUN = "run"
Arrays = Mapping[str, NDArray[np.float32]]


def merged(
    old: Arrays, new: Arrays, replaced: tuple[str, ...], most: int = MAX_BYTES
) -> FloatArrays:
    """What was kept, overlaid with what the last lease gave.

    Parameters
    ----------
    replaced : prefixes of names of which only the newest lease counts
    most : bytes; old names beyond it are dropped, new ones never

    Examples
    --------
    >>> zero = np.zeros(1, np.float32)
    >>> sorted(merged({"residual.a": zero, "b": zero}, {"c": zero}, ("residual.",)))
    ['b', 'c']
    >>> sorted(merged({"a": zero, "b": zero}, {"c": zero}, (), most=8))
    ['a', 'c']
    """
    kept = dict(new)
    size = sum(value.nbytes for value in kept.values())
    for name in sorted(old):
        if name in kept or name.startswith(replaced):
            continue
        size += old[name].nbytes
        if size > most:
            break
        kept[name] = old[name]
    return kept


class Kept:
    """The file, and no more than the names in it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kept.safetensors"

    def read(self, run: str, without: tuple[str, ...] = ()) -> FloatArrays:
        """float32 arrays of this run, as views of the file's mapping; empty when there is nothing of this run.

        What begins with one of `without` is not looked at, so that its pages take no memory.
        """
        if not self.path.exists():
            return {}
        try:
            found = tensors.mapped(self.path)
        except TensorError as error:
            log.warning("dropped: %s", error)
            return {}
        mark = found.pop(_RUN, None)
        if mark is None or mark.dtype != np.uint8 or mark.tobytes() != run.encode():
            return {}
        return {
            n: v
            for n, v in found.items()
            if not n.startswith(without) and v.dtype == np.float32 and np.isfinite(v).all()
        }

    def write(self, run: str, arrays: Arrays) -> None:
        """Replace the file; raises OSError."""
        mark = np.frombuffer(run.encode(), np.uint8)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(tensors.encode({**arrays, _RUN: mark}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
