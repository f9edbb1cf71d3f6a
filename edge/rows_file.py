"""Rows of floats on flash: hidden states of many more tokens than a device has memory for.

Read and written by position, not mapped: the pages of a mapping count as the process's memory, those of a file that is
read are the system's to drop.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class RowsFile:
    """float32 rows of one width in a file without a name, gone with the process.

    Parameters
    ----------
    folder : where there is room for it
    """

    def __init__(self, folder: Path, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        self.width, self.rows = width, 0

    @property
    def bytes(self) -> int:
        """What the file takes."""
        return 4 * self.width * self.rows

    def write(self, start: int, rows: Floats) -> None:
        """Rows [n, width] at row `start`; raises OSError when the flash is full."""
        data = _bytes(np.ascontiguousarray(rows, np.float32))
        at = 4 * self.width * start
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done
        self.rows = max(self.rows, start + len(rows))

    def read(self, start: int, count: int) -> Floats:
        """Rows [count, width] from row `start` on."""
        rows = np.empty((count, self.width), np.float32)
        self._read_into(start, rows)
        return rows

    def take(self, ids: NDArray[np.int64]) -> Floats:
        """Rows [n, width] of rising ids."""
        rows = np.empty((len(ids), self.width), np.float32)
        for begin, end in runs(ids):
            self._read_into(int(ids[begin]), rows[begin:end])
        return rows

    def add(self, ids: NDArray[np.int64], values: Floats) -> None:
        """Add [n, width] to the rows of rising ids."""
        rows = self.take(ids) + values
        for begin, end in runs(ids):
            self.write(int(ids[begin]), rows[begin:end])

    def _read_into(self, start: int, rows: Floats) -> None:
        data, at = _bytes(rows), 4 * self.width * start
        while data:
            done = os.preadv(self._file.fileno(), [data], at)
            if not done:
                raise IndexError(f"row {start + len(rows) - 1} of {self.rows}")
            data, at = data[done:], at + done

    def close(self) -> None:
        """Give the flash back."""
        self._file.close()


def _bytes(rows: Floats) -> memoryview:
    return rows.reshape(-1).view(np.uint8).data


def runs(ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(begin, end) of the stretches in which each id is the one before plus 1.

    >>> runs(np.array([3, 4, 5, 9, 11, 12]))
    [(0, 3), (3, 4), (4, 6)]
    >>> runs(np.array([], np.int64))
    []
    """
    if not len(ids):
        return []
    cuts = (np.flatnonzero(np.diff(ids) != 1) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(ids)], strict=True))
