"""What `export` built, read-only: STORE/base.json, STORE/<profile>/manifest.json, their signatures, STORE/blobs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from protocol.manifest import BaseIndex, Manifest, ManifestError, Shape, read_base, read_manifest
from server.adapters import map_tensors

_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Artifacts:
    """A store of artifacts.

    Raises
    ------
    ManifestError
        No base, no profile, or a manifest that does not fit the base.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base: BaseIndex = read_base(folder / "base.json")
        self._manifests: dict[str, tuple[int, Manifest]] = {}
        shapes = [self.manifest(name).shape for name in self.profiles()]
        if not shapes:
            raise ManifestError(f"{folder}: no profile is built there, see python -m export.build")
        # The run's rank: of the adapter that every device's factors are cut from.
        self.rank = max(map(_largest_rank, shapes))

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
            Unknown profile, unreadable file, another base, wrong number of layers, a format that the base lacks, a rank
            above the run's.
        """
        path = self.manifest_path(profile)
        stamp = path.stat().st_mtime_ns
        cached = self._manifests.get(profile)
        if cached is not None and cached[0] == stamp:
            return cached[1]
        manifest = read_manifest(path)
        if manifest.base != self.base.base:
            raise ManifestError(f"{path}: built from another base")
        self._check(manifest.shape, str(path))
        self._manifests[profile] = (stamp, manifest)
        return manifest

    def _check(self, shape: Shape, where: str) -> None:
        base = self.base
        if len(shape.slots) != len(base.moe_layers):
            found, wanted = len(shape.slots), len(base.moe_layers)
            raise ManifestError(f"{where}: slots for {found} layers found, {wanted} wanted")
        if shape.dense not in base.dense:
            raise ManifestError(f"{where}: dense {shape.dense}, the base has {_list(base.dense)}")
        for slot in (slot for layer in shape.slots for slot in layer):
            # Adapter experts have no frozen weights, hence no blobs.
            if slot.format != "none" and slot.format not in base.experts:
                raise ManifestError(
                    f"{where}: slot of {slot.format}, the base has {_list(base.experts)}"
                )
        if hasattr(self, "rank") and _largest_rank(shape) > self.rank:
            raise ManifestError(
                f"{where}: rank {_largest_rank(shape)} found, at most {self.rank} wanted"
            )

    def signature(self, path: Path) -> dict[str, str]:
        """Headers with the signature of a file of the store and the key it is by; none when it is not signed."""
        try:
            signature = path.with_suffix(".sig").read_bytes()
            key = (self.folder / "key.pub").read_text(encoding="ascii")
            # The raw key is the end of what the PEM file holds.
            raw = base64.b64decode("".join(key.splitlines()[1:-1]))[-32:]
        except (OSError, ValueError):
            return {}
        if len(raw) != 32:
            return {}
        return {
            "X-Signature": base64.b64encode(signature).decode(),
            "X-Signature-Key": base64.b64encode(raw).decode(),
        }

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
        dense = self._dense()
        try:
            return {layer: dense[f"layers.{layer}.router"] for layer in self.base.moe_layers}
        except KeyError as error:
            raise ManifestError(f"{self.folder}: dense blob without {error}") from error

    def router_extra(self) -> dict[str, NDArray[Any]]:
        """`layers.l.router.<name>` -> what routers have beside their rows; raises ManifestError as `routers`."""
        return {n: value for n, value in self._dense().items() if ".router." in n}

    def _dense(self) -> dict[str, NDArray[Any]]:
        blob = self.base.dense[min(self.base.dense)]  # routers are the same in every format
        path = self.blob_path(blob.sha256)
        try:
            return map_tensors(path)
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ManifestError(f"{path}: no readable dense blob: {error}") from error


def _largest_rank(shape: Shape) -> int:
    return max(slot.rank for layer in shape.slots for slot in layer)


def _list(formats: Iterable[str]) -> str:
    return ", ".join(sorted(formats)) or "none"
