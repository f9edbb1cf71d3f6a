"""From the store's owner through the server to a device: signed, changed on the way, rolled back."""

import dataclasses

import pytest

from edge import fetch
from edge.fetch import FetchError
from edge.fetch import Server as Client
from edge.trust import Trust, TrustError
from export.keys import generate, read_private
from export.publish import publish
from protocol.manifest import read_base, read_manifest, to_json


@pytest.fixture
def sign(store, tmp_path):
    secret, public = generate(tmp_path / "release")
    key, folder = read_private(secret), store[0]

    def again(**changes):
        for profile in ("small", "large"):
            manifest = read_manifest(folder / profile / "manifest.json")
            changed = dataclasses.replace(manifest, **changes)
            publish(folder, read_base(folder / "base.json"), changed, key)

    again.public = public
    return again


def test_a_device_takes_what_is_signed_and_nothing_else(serve, store, sign, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    server = serve()
    client, work = Client(server.url), tmp_path / "work"
    with pytest.raises(TrustError, match=r"/v1/base: not signed"):
        client.base(Trust(work, sign.public))
    sign()
    trust = Trust(work, sign.public)
    assert client.base(trust) == store[1]
    old = (store[0] / "small" / "manifest.json").read_bytes()
    old_signature = (store[0] / "small" / "manifest.sig").read_bytes()
    first = client.manifest("small", trust)
    sign(experts={"0": (0,)})
    second = client.manifest("small", trust)
    assert second.version > first.version

    path = store[0] / "small" / "manifest.json"
    signature = path.with_suffix(".sig").read_bytes()
    path.write_bytes(to_json(dataclasses.replace(second, experts={})))
    with pytest.raises(TrustError, match="does not fit"):
        client.manifest("small", trust)
    path.write_bytes(old)
    path.with_suffix(".sig").write_bytes(old_signature)
    with pytest.raises(TrustError, match="rolled back"):
        client.manifest("small", trust)
    # Signed, but of another profile.
    path.write_bytes((store[0] / "large" / "manifest.json").read_bytes())
    path.with_suffix(".sig").write_bytes((store[0] / "large" / "manifest.sig").read_bytes())
    with pytest.raises(FetchError, match="manifest of 'large' found"):
        client.manifest("small", trust)
    path.write_bytes(to_json(second))
    path.with_suffix(".sig").write_bytes(signature)
    assert client.manifest("small", trust) == second
    for broken in (b"", b"x" * 64):
        path.with_suffix(".sig").write_bytes(broken)
        with pytest.raises(TrustError):
            client.manifest("small", trust)
    (store[0] / "key.pub").write_bytes(b"no key")
    with pytest.raises(TrustError, match="not signed"):
        client.manifest("small", trust)


def test_the_first_key_is_remembered(serve, sign, tmp_path):
    sign()
    client = Client(serve().url)
    client.base(Trust(tmp_path / "work", None))
    assert (tmp_path / "work" / "trusted.pub").read_bytes() == sign.public.read_bytes()
