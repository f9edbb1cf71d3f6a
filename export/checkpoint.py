"""Read a Hugging Face checkpoint lazily: one tensor in memory at a time, from a directory or a hub id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


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


class Checkpoint:
    """Tensors of a checkpoint directory by name, from one or many shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{path}: no config.json, so this is no checkpoint directory")
        self.config: dict[str, Any] = _json(config)
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if index.is_file():
            shards: dict[str, str] = _json(index).get("weight_map", {})
            files = sorted(set(shards.values()))
        elif single.is_file():
            files = [single.name]
        else:
            raise CheckpointError(f"{path}: no model.safetensors and no index of shards")
        self._where: dict[str, Any] = {}
        self._stored: dict[str, str] = {}  # of renamed tensors: the name in the shard
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index}: shard {file!r} is not a plain file name")
            shard = self._open(path / file)
            self._where |= {name: shard for name in shard.keys()}

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt").__enter__()
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: shard is missing") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or not safetensors: {error}") from error

    def rename(self, aliases: Sequence[tuple[str, str]]) -> None:
        """Also find tensors by the names a model has for them: (part of the model's name, the same part here)."""
        for ours, theirs in aliases:
            for name in list(self._where):
                other = name.replace(theirs, ours)
                if other != name and other not in self._where:
                    self._where[other], self._stored[other] = self._where[name], name

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """All tensor names."""
        return sorted(self._where)

    def tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor as float32; with `index` only that entry of its first dimension.

        Raises
        ------
        CheckpointError
            The name is not there, or its values are not finite.
        """
        if name not in self._where:
            raise CheckpointError(f"{self.path}: tensor '{name}' is missing")
        try:
            shard, stored = self._where[name], self._stored.get(name, name)
            value = shard.get_tensor(stored) if index is None else shard.get_slice(stored)[index]
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: tensor '{name}' is unreadable: {error}") from error
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


def _json(path: Path) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {type(value).__name__} found, table wanted")
    return value
