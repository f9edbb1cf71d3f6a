"""What `export` built, read-only: STORE/base.json, STORE/<profile>/manifest.json, STORE/blobs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from protocol.manifest import BaseIndex, Manifest, ManifestError, read_base, read_manifest
from server.adapters import map_tensors

_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Artifacts:
    """A store of artifacts.

    Raises
    ------
    ManifestError
        No base, no profile, or profiles of different ranks (one adapter cannot serve both).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base: BaseIndex = read_base(folder / "base.json")
        self._manifests: dict[str, tuple[int, Manifest]] = {}
        ranks = {name: self.manifest(name).shape.rank for name in self.profiles()}
        if not ranks:
            raise ManifestError(f"{folder}: no profile is built there, see python -m export.build")
        if len(set(ranks.values())) > 1:
            found = ", ".join(f"{name} {rank}" for name, rank in sorted(ranks.items()))
            raise ManifestError(f"{folder}: one rank wanted for all profiles, found {found}")
        self.rank = next(iter(ranks.values()))

    def profiles(self) -> list[str]:
        """Names of the profiles that are built."""
        return sorted(p.parent.name for p in self.folder.glob("*/manifest.json"))

    def manifest_path(self, profile: str) -> Path:
        """Where a profile's manifest is; raises ManifestError that names the known profiles."""
        path = self.folder / profile / "manifest.json"
        if not _PROFILE.fullmatch(profile) or not path.is_file():
            known = ", ".join(self.profiles())
            raise ManifestError(f"profile '{profile[:64]}' is not in the store; known: {known}")
        return path

    def manifest(self, profile: str) -> Manifest:
        """A profile's manifest, read again when the file changed.

        Raises
        ------
        ManifestError
            Unknown profile, unreadable file, another base, wrong number of layers, another rank.
        """
        path = self.manifest_path(profile)
        stamp = path.stat().st_mtime_ns
        cached = self._manifests.get(profile)
        if cached is not None and cached[0] == stamp:
            return cached[1]
        manifest = read_manifest(path)
        if manifest.base != self.base.base:
            raise ManifestError(f"{path}: built from another base")
        if len(manifest.shape.slots) != len(self.base.moe_layers):
            raise ManifestError(f"{path}: {len(manifest.shape.slots)} layers of slots")
        if hasattr(self, "rank") and manifest.shape.rank != self.rank:
            raise ManifestError(f"{path}: rank {manifest.shape.rank} found, {self.rank} wanted")
        self._manifests[profile] = (stamp, manifest)
        return manifest

    def blob_path(self, sha256: str) -> Path:
        """Where a blob of the store would be."""
        return self.folder / "blobs" / sha256

    def routers(self) -> dict[int, NDArray[Any]]:
        """Layer -> base router rows [E, hidden], memory-mapped.

        Raises
        ------
        ManifestError
            When the dense blob is absent or lacks them.
        """
        path = self.blob_path(self.base.dense.sha256)
        try:
            dense = map_tensors(path)
            return {layer: dense[f"layers.{layer}.router"] for layer in self.base.moe_layers}
        except (OSError, KeyError, ValueError) as error:
            raise ManifestError(f"{path}: no readable dense blob: {error}") from error
