import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import PROTOCOL_VERSION, messages, schema
from protocol.manifest import Blob
from protocol.messages import (
    MAX_MESSAGE,
    Grant,
    Lease,
    MessageError,
    Offer,
    Ready,
    Receipt,
    Register,
    RoundInfo,
    RunOver,
    Status,
    Task,
    Welcome,
)

text = st.text(max_size=20)
natural = st.integers(0, 2**53)
number = st.floats(allow_nan=False, allow_infinity=False)
experts = st.dictionaries(
    st.integers(0, 99).map(str), st.lists(natural, max_size=5).map(tuple), max_size=4
)
blobs = st.builds(Blob, sha256=st.text("0123456789abcdef", min_size=64, max_size=64), bytes=natural)
version = st.just(PROTOCOL_VERSION)
tasks = st.builds(Task, template=text, labels=st.lists(text, max_size=4).map(tuple))
any_message = st.one_of(
    st.builds(
        Register, protocol=version, device=text, profile=text, token=st.none() | text, rows=natural
    ),
    st.builds(
        Welcome, protocol=version, fleet=text, run=text, token=text, broker=text, base=text, task=tasks
    ),
    st.builds(Ready, device=text, run=text),
    st.builds(
        Lease, lease=text, run=text, round=natural, attempt=natural,
        work=st.sampled_from(["profile", "train", "evaluate"]), base_version=natural, resident=experts,
        trained=experts, adapter=blobs, steps=natural, learning_rate=number,
        router_learning_rate=number, seed=natural, seconds=number, nonce=text,
    ),
    st.builds(Offer, lease=text, device=text, bytes=natural, sha256=text, mac=text),
    st.builds(Grant, lease=text, xfer=text, chunk_bytes=natural, window=natural),
    st.builds(
        Receipt, lease=text, xfer=text, missing=st.lists(natural, max_size=9).map(tuple),
        final=st.booleans(), accepted=st.booleans(), reason=text,
    ),
    st.builds(RunOver, run=text),
    st.builds(RoundInfo, run=text, round=natural, base_version=natural, over=st.booleans()),
    st.builds(Status, device=text, state=st.sampled_from(["online", "offline"])),
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)


@given(any_message)
def test_every_message_survives_the_wire(message):
    assert messages.decode(messages.encode(message)) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with pytest.raises(MessageError):
        messages.decode(data)


@given(any_message, st.data())
def test_a_wrong_value_anywhere_is_refused_or_fits(message, data):
    value = schema.to_dict(message)
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(anything)
    try:
        wire = json.dumps(value).encode()
        decoded = messages.decode(wire)
    except MessageError:
        return
    assert messages.decode(messages.encode(decoded)) == decoded


@given(any_message, text.filter(lambda s: s not in ("kind", "protocol")))
def test_unknown_and_missing_keys_are_refused(message, key):
    value = schema.to_dict(message)
    if key not in value:
        with pytest.raises(MessageError, match="unknown key"):
            messages.decode(json.dumps({**value, key: 1}).encode())
    fields = dataclasses.fields(message)
    optional = {f.name for f in fields if f.default is not dataclasses.MISSING}
    for known in set(value) - optional:
        with pytest.raises(MessageError, match=f"key '{known}' is missing"):
            messages.decode(json.dumps({k: v for k, v in value.items() if k != known}).encode())


def test_errors_say_what_was_found_and_wanted():
    for wire, line in (
        (b"[1]", "message of unknown kind 'None'"),
        (b'{"kind": "ready", "device": 1, "run": "r"}', "ready: device: int found, str wanted"),
        (
            b'{"kind": "ready", "devise": "a"}',
            "ready: unknown key 'devise', did you mean 'device'?",
        ),
        (
            b'{"kind": "run_over", "run": "r", "x": 1}',
            "run_over: unknown key 'x'; known: kind, run",
        ),
        (b"{" * 100_000, "message of 100000 bytes, at most 65536 wanted"),
        (b"[" * 60_000, "message is not JSON"),
    ):
        with pytest.raises(MessageError) as caught:
            messages.decode(wire)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)


def test_another_protocol_version_is_refused():
    wire = messages.encode(Register(protocol=99, device="a", profile="p", rows=1))
    with pytest.raises(MessageError, match=f"protocol 99 found, {PROTOCOL_VERSION} wanted"):
        messages.decode(wire)


def test_expect_wants_one_kind():
    with pytest.raises(MessageError, match="run_over found, ready wanted"):
        messages.expect(Ready, messages.encode(RunOver(run="r")))


def test_the_lease_of_a_large_model_fits():
    all_experts = {str(layer): tuple(range(64)) for layer in range(48)}
    lease = Lease(
        lease="x" * 64, run="r", round=1, attempt=1, work="train", base_version=1,
        resident=all_experts, trained=all_experts, adapter=Blob(sha256="0" * 64, bytes=1), steps=1,
        learning_rate=1.0, router_learning_rate=1.0, seed=1, seconds=1.0, nonce="n",
    )  # fmt: skip
    assert len(messages.encode(lease)) < MAX_MESSAGE


@given(text, text, text, text, natural, text)
def test_a_signature_binds_every_field(token, lease, nonce, sha256, size, other):
    mac = messages.sign(token, lease, nonce, sha256, size)
    assert messages.verify(mac, token, lease, nonce, sha256, size)
    assert not messages.verify(mac, token, lease, nonce, sha256, size + 1)
    if other != token:
        assert not messages.verify(mac, other, lease, nonce, sha256, size)
    assert not messages.verify("ä", token, lease, nonce, sha256, size)
