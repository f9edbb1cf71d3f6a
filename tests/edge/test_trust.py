"""What a device believes, and what it refuses."""

import dataclasses
import logging

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge.trust import KEPT, Signed, Trust, TrustError, read_public

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(2)]


def signed(data, key):
    return Signed(data, key.sign(data), key.public_key().public_bytes_raw())


def public(key, path):
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def test_the_given_key_counts_and_is_kept(tmp_path):
    trust = Trust(tmp_path / "work", public(KEYS[0], tmp_path / "a.pub"))
    assert trust.check("m", signed(b"x", KEYS[0])) == b"x"
    # The next start may leave the flag out.
    with pytest.raises(TrustError, match="m: signed by key .*, key .* wanted"):
        Trust(tmp_path / "work", None).check("m", signed(b"x", KEYS[1]))
    # Another key has to be given by hand.
    trust = Trust(tmp_path / "work", public(KEYS[1], tmp_path / "b.pub"))
    assert trust.check("m", signed(b"x", KEYS[1])) == b"x"


def test_the_first_key_met_is_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Trust(tmp_path, None).check("m", signed(b"x", KEYS[0]))
    assert "met for the first time" in caplog.text
    again = Trust(tmp_path, None)
    assert again.check("m", signed(b"y", KEYS[0])) == b"y"
    with pytest.raises(TrustError, match="signed by"):
        again.check("m", signed(b"y", KEYS[1]))
    with pytest.raises(TrustError, match="not signed, a signature by key"):
        again.check("m", Signed(b"y", None, None))


def test_what_is_not_signed_is_taken_by_who_never_saw_a_key(tmp_path, caplog):
    trust = Trust(tmp_path, None)
    assert trust.check("m", Signed(b"x", None, None)) == b"x"
    assert trust.check("m", Signed(b"x", None, None)) == b"x"
    assert caplog.text.count("not signed") == 1
    trust.check_version("http://a", "base", "p", 5)
    trust.check_version("http://a", "base", "p", 4)  # without a signature a version says nothing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"data": b"y"},
        {"signature": b"\x00" * 64},
        {"signature": b""},
        {"signature": b"short"},
        {"key": b""},
        {"key": b"\xff" * 32},
        {"key": b"\x00" * 32},
    ],
)
def test_what_was_changed_is_refused_and_no_key_is_kept(tmp_path, known, change):
    trust = Trust(tmp_path, public(KEYS[0], tmp_path / "a.pub") if known else None)
    answer = dataclasses.replace(signed(b"x", KEYS[0]), **change)
    with pytest.raises(TrustError):
        trust.check("m", answer)
    assert (tmp_path / KEPT).exists() == known


def test_an_older_manifest_is_refused(tmp_path):
    trust = Trust(tmp_path, public(KEYS[0], tmp_path / "a.pub"))
    for version in (5, 5, 7):
        trust.check_version("http://a", "base", "p", version)
    with pytest.raises(TrustError, match="p: version 6 found, 7 was used before: rolled back"):
        Trust(tmp_path, None).check_version("http://a", "base", "p", 6)
    trust.check_version("http://a", "base", "other", 6)
    trust.check_version("http://a", "other base", "p", 6)
    trust.check_version("http://b", "base", "p", 6)
    with pytest.raises(TrustError, match="rolled back"):
        trust.check_version("http://a", "base", "p", 6)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\x00", b"-----BEGIN PUBLIC KEY-----"])
def test_a_file_that_is_no_key(tmp_path, content):
    path = tmp_path / "k.pub"
    path.write_bytes(content)
    with pytest.raises(TrustError, match="an Ed25519 public key in PEM form wanted"):
        Trust(tmp_path, path)
    with pytest.raises(TrustError, match="No such file"):
        read_public(tmp_path / "none.pub")
    assert not (tmp_path / KEPT).exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"http://a base p": "x"}', b"\xff"])
def test_a_broken_list_of_versions_is_started_anew(tmp_path, content):
    trust = Trust(tmp_path, public(KEYS[0], tmp_path / "a.pub"))
    (tmp_path / "versions.json").write_bytes(content)
    trust.check_version("http://a", "base", "p", 3)
    with pytest.raises(TrustError, match="rolled back"):
        trust.check_version("http://a", "base", "p", 2)
