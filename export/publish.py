"""The two indices of a store, with version and signature: written last, so that what they name is there.

    STORE/base.json  base.sig    STORE/<profile>/manifest.json  manifest.sig    STORE/key.pub

A signature is 64 bytes over the file beside it. A manifest's version is the time of its build in seconds, and more than
that of the manifest it replaces: it needs no memory but the clock, also when a store is made anew on another machine.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.blob_store import write_atomically
from export.keys import KeyFileError, public_pem
from protocol.manifest import BaseIndex, Manifest, ManifestError, read_manifest, to_json


def check_key(store: Path, key: Ed25519PrivateKey | None) -> None:
    """A store is signed by one key or not at all: its devices refuse anything else.

    Raises
    ------
    KeyFileError
    """
    path = store / "key.pub"
    if path.exists() and key is None:
        raise KeyFileError(f"{store}: is signed, --sign with the key of {path} wanted")
    if path.exists() and key is not None and path.read_bytes() != public_pem(key):
        raise KeyFileError(f"{store}: is signed with the key of {path}, another one was given")


def publish(
    store: Path, base: BaseIndex, artifact: Manifest, key: Ed25519PrivateKey | None
) -> Manifest:
    """Write base and manifest; returns the manifest with its version. An unchanged one keeps its version.

    Raises
    ------
    KeyFileError
        The store is signed with another key.
    """
    check_key(store, key)
    path = store / artifact.profile / "manifest.json"
    artifact = dataclasses.replace(artifact, version=_version(path, artifact))
    write(store / "base.json", to_json(base), key)
    write(path, to_json(artifact), key)
    if key is not None:
        write_atomically(store / "key.pub", public_pem(key))
    return artifact


def _version(path: Path, artifact: Manifest) -> int:
    try:
        last = read_manifest(path)
    except ManifestError:
        return int(time.time())
    if dataclasses.replace(artifact, version=last.version) == last:
        return last.version
    return max(int(time.time()), last.version + 1)


def write(path: Path, data: bytes, key: Ed25519PrivateKey | None) -> None:
    """Write a file, and with a key its signature before it."""
    if key is not None:
        write_atomically(path.with_suffix(".sig"), key.sign(data))
    write_atomically(path, data)
