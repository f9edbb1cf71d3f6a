"""Chunks of an upload: a fixed header with its own checksum, then the body.

header: magic "MC1\\0", chunk index, chunk count, body length, CRC-32 of the body (five little-endian uint32,
the magic counted as one).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

_HEADER = struct.Struct("<4sIIII")
MAGIC = b"MC1\0"
CHUNK_BYTES = 120 << 10  # fits the packet limits of the large public brokers


class ChunkError(ValueError):
    """Bytes that are not a whole chunk."""


@dataclass(frozen=True)
class Chunk:
    """One piece: `index` of `count`."""

    index: int
    count: int
    body: bytes


def count(size: int, chunk_bytes: int) -> int:
    """How many chunks a blob of `size` bytes takes (at least one).

    >>> count(0, 100), count(100, 100), count(101, 100)
    (1, 1, 2)
    """
    return max(1, -(-size // chunk_bytes))


def cut(data: bytes, index: int, chunk_bytes: int) -> bytes:
    """The wire bytes of chunk `index` of `data`."""
    body = data[index * chunk_bytes : (index + 1) * chunk_bytes]
    header = _HEADER.pack(MAGIC, index, count(len(data), chunk_bytes), len(body), zlib.crc32(body))
    return header + body


def parse(data: bytes) -> Chunk:
    """Check and open a chunk.

    Raises
    ------
    ChunkError
        Too short, wrong magic, wrong length, wrong checksum, index outside the count.
    """
    if len(data) < _HEADER.size:
        raise ChunkError(f"chunk of {len(data)} bytes")
    magic, index, total, length, crc = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if magic != MAGIC:
        raise ChunkError("wrong magic")
    if length != len(body):
        raise ChunkError(f"chunk body of {len(body)} bytes, {length} announced")
    if zlib.crc32(body) != crc:
        raise ChunkError("wrong checksum")
    if index >= total:
        raise ChunkError(f"chunk {index} of {total}")
    return Chunk(index, total, body)
