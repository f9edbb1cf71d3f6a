"""Keys to sign artifacts with (Ed25519, PEM files): python -m export.keys --out release

    python -m export.keys --out release                  # release.key stays with you, release.pub goes to the devices
    python -m export.build --sign release.key --profile pixel_8 --out store
    python -m edge --trust release.pub ...

A signature is the raw 64 bytes over the file, so others can check it too:
    openssl pkeyutl -verify -pubin -inkey release.pub -rawin -in manifest.json -sigfile manifest.sig
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)


class KeyFileError(ValueError):
    """A key file that is missing, of another kind, or would be overwritten."""


def generate(out: Path) -> tuple[Path, Path]:
    """Write OUT.key, readable by its owner alone, and OUT.pub.

    Raises
    ------
    KeyFileError
        One of them exists.
    """
    key = Ed25519PrivateKey.generate()
    private, public = out.with_name(out.name + ".key"), out.with_name(out.name + ".pub")
    if public.exists():
        raise KeyFileError(f"{public}: exists, and a key is never overwritten")
    private.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise KeyFileError(f"{private}: exists, and a key is never overwritten") from error
    with open(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(public_pem(key))
    return private, public


def public_pem(key: Ed25519PrivateKey) -> bytes:
    """The public half, as a file."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_private(path: Path) -> Ed25519PrivateKey:
    """A private key file.

    Raises
    ------
    KeyFileError
        It is missing, encrypted, or holds no Ed25519 key in PEM form.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: an unencrypted Ed25519 key in PEM form wanted") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: an unencrypted Ed25519 key in PEM form wanted")
    return key


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the two files."""
    parser = argparse.ArgumentParser(
        prog="python -m export.keys",
        description=__doc__.splitlines()[0],
        epilog="example: python -m export.keys --out release",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="NAME", help="NAME.key, NAME.pub"
    )
    args = parser.parse_args(argv)
    try:
        for path in generate(args.out):
            print(path)
    except (KeyFileError, OSError) as error:
        print(f"export.keys: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
