"""Read a Hugging Face checkpoint by pieces of tensors: from a directory or a hub id, without mapping its files.

Pages of a mapped file count as memory of the process that read them; bytes read through a file descriptor do not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from protocol.manifest import sha256_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SMALL = 64 << 20  # bytes of a file that is identified by its content
RACY = 2.0  # seconds in which a file may change again without another time stamp


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated or not in safetensors form."""


def locate(name: str) -> Path:
    """A local directory as it is; anything else is fetched from the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name}: a file found, a checkpoint directory or hub id wanted")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such directory, and not a hub id (owner/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{name}: neither a directory nor on the hub: {reason}") from error


@dataclass(frozen=True)
class _Shard:
    """One safetensors file, open for reading at any place by any thread."""

    path: Path
    descriptor: int
    start: int  # of the tensors' bytes
    header: dict[str, Any]

    def stamp(self) -> tuple[int, ...]:
        """Another one whenever the file may have been written to."""
        stat = os.fstat(self.descriptor)
        # The change time, unlike the modification time, cannot be set: whatever writes to the file moves it.
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def identity(self) -> str:
        """Changes whenever the content may have changed. A small file is read for it, a large one is not."""
        stat = os.fstat(self.descriptor)
        if stat.st_size < SMALL:
            return sha256_file(self.path)
        # Two writes within one tick of the clock have the same time: only an older file is known by it.
        time.sleep(min(max(stat.st_ctime + RACY - time.time(), 0.0), RACY))
        return f"{self.stamp()} {json.dumps(self.header)}"


class Checkpoint:
    """Tensors of a checkpoint directory by name, from one or many shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: list[_Shard] = []
        self._stamps: list[tuple[int, ...]] = []
        config = path / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{path}: no config.json, so this is no checkpoint directory")
        self.config: dict[str, Any] = _json(config)
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if index.is_file():
            shards = _json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(file, str) for file in shards.values()
            ):
                raise CheckpointError(f"{index}: a table of shards wanted at 'weight_map'")
            files = sorted(set(shards.values()))
        elif single.is_file():
            files = [single.name]
        else:
            raise CheckpointError(f"{path}: no model.safetensors and no index of shards")
        self._where: dict[str, tuple[_Shard, Any]] = {}
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index}: shard {file!r} is not a plain file name")
            shard = _open(path / file)
            self._shards.append(shard)
            self._stamps.append(shard.stamp())
            self._where |= {name: (shard, entry) for name, entry in shard.header.items()}

    def rename(self, aliases: Sequence[tuple[str, str]]) -> None:
        """Also find tensors by the names a model has for them: (part of the model's name, the same part here)."""
        for ours, theirs in aliases:
            for name, where in list(self._where.items()):
                self._where.setdefault(name.replace(theirs, ours), where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """All tensor names."""
        return sorted(self._where)

    def identity(self) -> str:
        """Hash that changes whenever a weight may have changed."""
        parts = [shard.identity() for shard in self._shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def changed(self) -> bool:
        """Whether a shard was written to since it was opened."""
        return [shard.stamp() for shard in self._shards] != self._stamps

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; raises CheckpointError when it is not there."""
        return tuple(self._entry(name)[1]["shape"])

    def _entry(self, name: str) -> tuple[_Shard, Any]:
        if name not in self._where:
            raise CheckpointError(f"{self.path}: tensor '{name}' is missing")
        return self._where[name]

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Entries `start` to `stop` of a tensor's first dimension, in the checkpoint's own float type.

        Raises
        ------
        CheckpointError
            The name is not there, has fewer entries, is of no float type, or the file ended.
        """
        shard, entry = self._entry(name)
        shape, dtype = entry["shape"], DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: '{name}' is {entry['dtype']}, one of {', '.join(DTYPES)} wanted"
            )
        count = shape[0] if shape else 1
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise CheckpointError(
                f"{self.path}: '{name}' has {count} entries, {start} to {stop} wanted"
            )
        row = math.prod(shape[1:]) * dtype.itemsize
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        view, at = memoryview(data.numpy()), shard.start + entry["data_offsets"][0] + start * row
        while view:
            got = os.preadv(shard.descriptor, [view], at)
            if not got:
                raise CheckpointError(f"{shard.path}: truncated: '{name}' is not whole")
            view, at = view[got:], at + got
        return data.view(dtype).view((stop - start, *shape[1:]) if shape else ())

    def tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor as float32; with `index` only that entry of its first dimension.

        Raises
        ------
        CheckpointError
            As `raw`, or its values are not finite.
        """
        value = self.raw(name) if index is None else self.raw(name, index, index + 1)[0]
        value = value.float()
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{self.path}: tensor '{name}' holds NaN or infinity")
        return value

    def file(self, name: str) -> bytes:
        """A file that lies beside the weights."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: no {name}") from error

    def close(self) -> None:
        """Release the files."""
        for shard in self._shards:
            os.close(shard.descriptor)
        self._shards.clear()

    def __del__(self) -> None:
        self.close()


def _open(file: Path) -> _Shard:
    try:
        # The library checks the header; reading is our own.
        with safe_open(file, framework="pt"):
            pass
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: shard is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not safetensors: {error}") from error
    size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    header = json.loads(os.pread(descriptor, size, 8))
    header.pop("__metadata__", None)
    return _Shard(file, descriptor, 8 + size, header)


def _json(path: Path) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {type(value).__name__} found, table wanted")
    return value
