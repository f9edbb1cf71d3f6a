"""Whose artifacts this device runs: an Ed25519 key, given (`--trust`) or kept from the first signed answer.

Three things are noticed: an artifact that another key signed or none, one that was changed on its way, and a manifest
older than one that this device has used. What is signed are the bytes of base.json and of manifest.json; programs and
weights are named in these by their content.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

log = logging.getLogger(__name__)
KEPT = "trusted.pub"
VERSIONS = "versions.json"


class TrustError(ValueError):
    """An artifact that this device must not run, or a key file that is none."""


@dataclass(frozen=True)
class Signed:
    """Bytes as they came, with the signature and the raw public key that came with them."""

    data: bytes
    signature: bytes | None
    key: bytes | None


class Trust:
    """The key that counts, kept in the work folder.

    Parameters
    ----------
    given : Path or None
        A public key in PEM form. None: the key kept from before, or the first one that is met.

    Raises
    ------
    TrustError
        `given` cannot be read.
    """

    def __init__(self, folder: Path, given: Path | None) -> None:
        self.folder, self._warned = folder, False
        kept = folder / KEPT
        path = given or (kept if kept.exists() else None)
        self.key: Ed25519PublicKey | None = None
        if path is not None:
            self.key = read_public(path)
        if given is not None:
            self._keep()

    def check(self, what: str, answer: Signed) -> bytes:
        """The bytes, once they may be used.

        Raises
        ------
        TrustError
            They are not signed, or not by the trusted key, or were changed.
        """
        if answer.signature is None or answer.key is None:
            if self.key is not None:
                raise TrustError(f"{what}: not signed, a signature by {name(self.key)} wanted")
            if not self._warned:
                log.warning("%s: not signed; see python -m export.build --sign", what)
                self._warned = True
            return answer.data
        # Loaded only where something is signed: it costs a small device 10 MB.
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            shown = Ed25519PublicKey.from_public_bytes(answer.key)
            key = self.key or shown
            if name(key) != name(shown):
                raise TrustError(f"{what}: signed by {name(shown)}, {name(key)} wanted")
            key.verify(answer.signature, answer.data)
        except InvalidSignature as error:
            raise TrustError(f"{what}: the signature by {name(key)} does not fit") from error
        except (ValueError, TypeError) as error:
            if isinstance(error, TrustError):
                raise
            raise TrustError(f"{what}: no Ed25519 key came with the signature") from error
        if self.key is None:
            self.key = key
            self._keep()
            log.info("key %s met for the first time: trusted from now on", name(key))
        return answer.data

    def check_version(self, server: str, base: str, profile: str, version: int) -> None:
        """Refuse a manifest older than one used before from this server; only signed ones have versions to rely on.

        Raises
        ------
        TrustError
        """
        if self.key is None:
            return
        path = self.folder / VERSIONS
        try:
            known = json.loads(path.read_bytes())
        except (OSError, ValueError):
            known = {}
        if not isinstance(known, dict):
            known = {}
        item = f"{server} {base} {profile}"
        newest = known.get(item)
        if isinstance(newest, int) and version < newest:
            raise TrustError(
                f"manifest of {profile}: version {version} found, {newest} was used before: rolled back"
            )
        if newest != version:
            _write(path, json.dumps({**known, item: version}).encode())

    def _keep(self) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        assert self.key is not None
        _write(
            self.folder / KEPT,
            self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        )


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.tmp")
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror}") from error


def name(key: Ed25519PublicKey) -> str:
    """The first characters of a public key, for people."""
    return "key " + key.public_bytes_raw().hex()[:16]


def read_public(path: Path) -> Ed25519PublicKey:
    """A public key file.

    Raises
    ------
    TrustError
        It is missing, or holds no Ed25519 public key in PEM form.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{path}: an Ed25519 public key in PEM form wanted") from error
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError(f"{path}: an Ed25519 public key in PEM form wanted")
    return key
