import dataclasses
import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from export import publish as publishing
from export.keys import KeyFileError, generate, main, read_private
from export.publish import check_key, publish
from protocol.manifest import read_base, read_manifest
from tests.server import tiny_store

PROFILES = {"small": ((tiny_store.FULL,) * 2,) * 2}


@pytest.fixture
def built(tmp_path):
    store = tmp_path / "store"
    tiny_store.build(store, PROFILES)
    return store, read_base(store / "base.json"), read_manifest(store / "small/manifest.json")


@pytest.fixture
def key(tmp_path):
    return read_private(generate(tmp_path / "release")[0])


def test_keys_are_private_and_never_overwritten(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "deep" / "release")]) == 0
    secret, public = map(os.path.abspath, capsys.readouterr().out.split())
    assert stat.S_IMODE(os.stat(secret).st_mode) == 0o600
    before = Path(secret).read_bytes()
    assert main(["--out", str(tmp_path / "deep" / "release")]) == 2
    assert "exists, and a key is never overwritten" in capsys.readouterr().err
    os.unlink(public)
    assert main(["--out", str(tmp_path / "deep" / "release")]) == 2
    assert Path(secret).read_bytes() == before


def test_other_files_are_no_keys(tmp_path):
    path = tmp_path / "k"
    with pytest.raises(KeyFileError, match="No such file"):
        read_private(path)
    other = ec.generate_private_key(ec.SECP256R1())
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"\x00\xff", pem):
        path.write_bytes(content)
        with pytest.raises(KeyFileError, match="an unencrypted Ed25519 key in PEM form wanted"):
            read_private(path)


def test_base_and_manifest_are_signed(built, key):
    store, base, manifest = built
    publish(store, base, manifest, key)
    for name in ("base", "small/manifest"):
        data = (store / f"{name}.json").read_bytes()
        signature = (store / f"{name}.sig").read_bytes()
        assert len(signature) == 64
        key.public_key().verify(signature, data)
        with pytest.raises(InvalidSignature):
            key.public_key().verify(signature, data + b" ")
    assert read_base(store / "base.json") == base


def test_openssl_agrees(built, key, tmp_path):
    store, base, manifest = built
    publish(store, base, manifest, key)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", store / "key.pub", "-rawin"]
    command += ["-in", store / "base.json", "-sigfile", store / "base.sig"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no openssl")
    assert "Success" in done.stdout, done.stderr


def test_versions_grow_and_stay_where_nothing_changed(built, monkeypatch):
    store, base, manifest = built
    now = 1_800_000_000
    monkeypatch.setattr(publishing.time, "time", lambda: now + 0.5)
    (store / "small/manifest.json").unlink()
    assert publish(store, base, manifest, None).version == now
    now += 60
    assert publish(store, base, manifest, None).version == now - 60
    other = dataclasses.replace(manifest, experts={"0": (1,)})
    assert publish(store, base, other, None).version == now
    now -= 1000  # a clock that was set back
    assert publish(store, base, manifest, None).version == now + 1001
    assert read_manifest(store / "small/manifest.json").version == now + 1001


def test_a_signed_store_stays_signed_by_the_same_key(built, key, tmp_path):
    store, base, manifest = built
    check_key(store, None)
    publish(store, base, manifest, key)
    check_key(store, key)
    before = (store / "small/manifest.json").read_bytes()
    other = read_private(generate(tmp_path / "other")[0])
    for wrong, words in ((None, "is signed, --sign with the key of"), (other, "another one was")):
        with pytest.raises(KeyFileError, match=words):
            publish(store, base, dataclasses.replace(manifest, experts={}), wrong)
    assert (store / "small/manifest.json").read_bytes() == before
