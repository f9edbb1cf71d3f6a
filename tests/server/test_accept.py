from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import names, update, uplink
from protocol.manifest import Blob
from protocol.messages import Lease
from protocol.objective import Objective
from server.accept import UpdateRejected, accept, max_update_bytes
from server.adapters import ranks
from tests.server.fake_device import FACTS, made_up_stats, made_up_tensors
from tests.server.tiny_store import FROZEN, FULL, HALF, base_index, shape

BASE = base_index()
LEASE = Lease(
    lease="r-1-a-1", run="r", round=1, attempt=1, work="train", base_version=3,
    resident={"0": (0, 2), "1": (1, 3)}, trained={"0": (0, 2), "1": (1,)},
    adapter=Blob(sha256="0" * 64, bytes=1), steps=2, learning_rate=1e-3, router_learning_rate=1e-4,
    seed=0, seconds=1.0, nonce="n",
)  # fmt: skip
SHAPE = shape(((FULL, HALF), (FULL, FROZEN)))
RANK_OF = ranks(LEASE.resident, SHAPE, BASE)
A = names.lora(0, 0, "gate_up", "lora_A")


def parts():
    return made_up_tensors(LEASE, BASE, SHAPE, 1), made_up_stats(LEASE, BASE, FACTS.tokens, 1)


def check(data, lease=LEASE, version=3):
    return accept(data, lease, BASE, rank_of=RANK_OF, tokens_per_step=32, version=version)


def test_a_good_update_passes():
    tensors, stats = parts()
    got = check(update.pack(tensors, stats, FACTS))
    assert got.facts == FACTS
    assert got.trained_tokens.sum() > 0
    np.testing.assert_array_equal(got.tensors[A], tensors[A])


def drop(t, s):
    del t[A]


def add(t, s):
    t[names.router_row(1, 3)] = np.zeros(BASE.hidden, np.float32)  # resident, but not to be trained


def reshape(t, s):
    t[A] = t[A].T.copy()


def retype(t, s):
    t[A] = t[A].astype(np.float64)


def nan(t, s):
    t[A][0, 0] = np.nan


def infinite(t, s):
    s["mass"][0, 0] = np.inf


def huge(t, s):
    t[A][:] = 1e4


def negative(t, s):
    s["top"][0, 0] = -1


def invented(t, s):
    s["mass"] *= 100


def greedy(t, s):
    s["trained_tokens"][0, 0] = 1e6


def elsewhere(t, s):
    s["trained_tokens"][1, 3] = 1


def certain(t, s):
    s["peak"][0, 0] = 1.1


def inverted(t, s):
    s["peak"][0, 0], s["high"][0, 0] = 0.5, 0.6


def backwards(t, s):
    s["taylor"][0, 0] = -1


def absent(t, s):
    s["taylor"][0, 1] = 1  # not resident


def telling(t, s):
    s["label_information"][1, 0] = 2  # of 4 experts, ln 4 at most


def small_stats(t, s):
    s["mass"] = s["mass"][:1]


CASES = {
    drop: "1 tensors missing, first: layers.0.experts.0.gate_up.lora_A",
    add: "1 tensors not asked for, first: 'layers.1.router.3'",
    reshape: r"lora_A: shape \(16, 2\) found, \(2, 16\) wanted",
    retype: "lora_A: float64 found, float32 wanted",
    nan: "lora_A: NaN or infinity",
    infinite: "mass: NaN or infinity",
    huge: "root mean square 1e\\+04, at most 8.0 wanted",
    negative: "stats.top: negative",
    invented: "more than the 64 tokens",
    greedy: "more than the 64 tokens of the lease",
    elsewhere: "an expert that was not trained",
    certain: "stats.peak: a probability above 1",
    inverted: "stats.high: above stats.peak",
    backwards: "stats.taylor: negative",
    absent: "stats.taylor: of an expert that was not resident",
    telling: "stats.label_information: more than the experts can tell",
    small_stats: r"mass: shape \(1, 4\) found",
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda f: f.__name__)
def test_refused_with_one_clear_line(spoil):
    tensors, stats = parts()
    spoil(tensors, stats)
    with pytest.raises(UpdateRejected, match=CASES[spoil]) as caught:
        check(update.pack(tensors, stats, FACTS))
    assert "\n" not in str(caught.value)


def test_stale_version():
    with pytest.raises(UpdateRejected, match="stale: trained from version 3, now 4"):
        check(update.pack(*parts(), FACTS), version=4)


def full_rank(t, s):
    for p in BASE.projections:  # of an expert in a slot of half the rank
        a, b = (names.lora(0, 2, p, f) for f in names.FACTORS)
        t[a], t[b] = np.repeat(t[a], 2, 0), np.repeat(t[b], 2, 1)


def frozen(t, s):
    for p in BASE.projections:
        for f in names.FACTORS:
            t[names.lora(1, 3, p, f)] = t[names.lora(1, 1, p, f)]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (full_rank, r"experts\.2\.down\.lora_A: shape \(2, 8\) found, \(1, 8\) wanted"),
        (frozen, r"4 tensors not asked for, first: 'layers\.1\.experts\.3\.down\.lora_A'"),
    ],
)
def test_every_expert_has_the_rank_of_its_slot(spoil, line):
    tensors, stats = parts()
    spoil(tensors, stats)
    with pytest.raises(UpdateRejected, match=line):
        check(update.pack(tensors, stats, FACTS))


def test_trained_must_be_resident_and_in_a_slot_that_trains():
    with pytest.raises(UpdateRejected, match="expert 1 of layer 0 is not among the resident"):
        check(b"", replace(LEASE, trained={"0": (1,)}))
    with pytest.raises(UpdateRejected, match="expert 3 of layer 1 is in a frozen slot"):
        check(b"", replace(LEASE, trained={"1": (3,)}))


@pytest.mark.parametrize(
    ("objective", "sent"),
    [
        (Objective(factors="lora_A"), "lora_A"),
        (Objective(factors="lora_B"), "lora_B"),
        (Objective(personal=True), "lora_A"),
    ],
)
def test_just_the_factors_of_the_lease(objective, sent):
    lease = replace(LEASE, objective=objective)
    tensors, stats = parts()
    whole = update.pack(tensors, stats, FACTS)
    with pytest.raises(UpdateRejected, match="tensors not asked for|bytes of tensors, at most"):
        check(whole, lease)
    half = {k: v for k, v in tensors.items() if "lora" not in k or k.endswith(sent)}
    got = check(update.pack(half, stats, FACTS), lease)
    assert set(got.tensors) == set(half)
    assert max_update_bytes(lease, RANK_OF, BASE) < max_update_bytes(LEASE, RANK_OF, BASE)
    with pytest.raises(UpdateRejected, match="tensors missing, first: .*lora_[AB]"):
        check(update.pack(half, stats, FACTS))


def test_facts_of_another_base():
    with pytest.raises(UpdateRejected, match="missed mass of 1 layers, 2 wanted"):
        check(update.pack(*parts(), replace(FACTS, missed_mass=(0.0,))))
    with pytest.raises(UpdateRejected, match="negative count"):
        check(update.pack(*parts(), replace(FACTS, steps=-1)))


def test_too_large():
    tensors, stats = parts()
    tensors["padding"] = np.zeros(10**6, np.float32)
    with pytest.raises(UpdateRejected, match="bytes of tensors, at most"):
        check(update.pack(tensors, stats, FACTS))


def test_the_size_limit_leaves_room_for_every_good_update():
    data = update.pack(*parts(), FACTS)
    assert len(data) <= max_update_bytes(LEASE, RANK_OF, BASE)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_line(data):
    with pytest.raises(UpdateRejected):
        check(data)


GOOD = update.pack(*parts(), FACTS)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_raises_anything_else(position, mask):
    data = bytearray(GOOD)
    data[position] ^= mask
    try:
        check(bytes(data))
    except UpdateRejected:
        pass


@given(st.integers(0, len(GOOD) - 1))
def test_a_truncated_update_is_refused(length):
    with pytest.raises(UpdateRejected):
        check(GOOD[:length])


# Coded updates, other objectives


LEASED = made_up_tensors(LEASE, BASE, SHAPE, 2)


def check_coded(data, lease, leased=LEASED):
    return accept(data, lease, BASE, rank_of=RANK_OF, tokens_per_step=32, version=3, leased=leased)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("int4", 0.25)])
def test_a_coded_update_comes_out_as_values(kind, error):
    tensors, stats = parts()
    change = {n: v - LEASED[n] for n, v in tensors.items()}
    data = update.pack(uplink.encode(change, kind), stats, FACTS)
    lease = replace(LEASE, uplink=kind)
    assert len(data) <= max_update_bytes(lease, RANK_OF, BASE)
    assert max_update_bytes(lease, RANK_OF, BASE) < max_update_bytes(LEASE, RANK_OF, BASE)
    got = check_coded(data, lease)
    assert got.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        off = np.linalg.norm(got.tensors[name] - value) / np.linalg.norm(change[name])
        assert off < error, name
    # The same bytes under a lease that did not ask for codes, and the other way round.
    with pytest.raises(UpdateRejected, match="2 tensors not asked for, first: 'change.codes'"):
        check(data)
    with pytest.raises(UpdateRejected, match=f"{kind} update: tensor 'change.codes' is missing"):
        check_coded(update.pack({}, stats, FACTS), lease)


@pytest.mark.parametrize("kind", uplink.KINDS)
def test_codes_are_checked_once_they_are_values(kind):
    tensors, stats = parts()
    lease = replace(LEASE, uplink=kind)
    coded = uplink.encode({n: v - LEASED[n] for n, v in tensors.items()}, kind)
    coded[uplink.SCALES][:] = 6e4
    with pytest.raises(UpdateRejected, match="root mean square"):
        check_coded(update.pack(coded, stats, FACTS), lease)
    coded[uplink.SCALES][0] = np.nan
    with pytest.raises(UpdateRejected, match="NaN"):
        check_coded(update.pack(coded, stats, FACTS), lease)


def test_the_rounding_of_the_downlink_is_no_change():
    lease = replace(LEASE, downlink="float16")
    tensors, stats = parts()
    rounded = {n: v.astype(np.float16).astype(np.float32) for n, v in LEASED.items()}
    same = check_coded(update.pack(rounded, stats, FACTS), lease)
    assert all(np.array_equal(same.tensors[n], LEASED[n]) for n in tensors)
    assert not all(np.array_equal(rounded[n], LEASED[n]) for n in tensors)
    coded = uplink.encode({n: np.zeros_like(v) for n, v in LEASED.items()}, "int8")
    same = check_coded(update.pack(coded, stats, FACTS), replace(lease, uplink="int8"))
    assert all(np.array_equal(same.tensors[n], LEASED[n]) for n in tensors)


@pytest.mark.parametrize(
    ("objective", "gone"),
    [
        (Objective(factors="lora_A"), "lora_B"),
        (Objective(factors="lora_B"), "lora_A"),
        (Objective(personal=True), "lora_B"),
    ],
)
def test_an_update_has_what_the_objective_sends(objective, gone):
    tensors, stats = parts()
    lease = replace(LEASE, objective=objective)
    with pytest.raises(UpdateRejected, match=f"not asked for, first: .*{gone}"):
        check(update.pack(tensors, stats, FACTS), lease)
    kept = {n: v for n, v in tensors.items() if not n.endswith(gone)}
    assert check(update.pack(kept, stats, FACTS), lease).tensors.keys() == kept.keys()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_control_variates_come_with_every_tensor(kind):
    tensors, stats = parts()
    lease = replace(LEASE, objective=Objective(scaffold=True), uplink=kind)
    with pytest.raises(UpdateRejected, match="missing|wanted"):
        check_coded(update.pack(tensors, stats, FACTS), lease)
    control = {f"scaffold.{n}": np.full_like(v, 0.5) for n, v in tensors.items()}
    change = {n: v - LEASED[n] for n, v in tensors.items()}
    sent = (
        {**tensors, **control} if kind == "float32" else uplink.encode({**change, **control}, kind)
    )
    got = check_coded(update.pack(sent, stats, FACTS), lease)
    assert got.tensors.keys() == {*tensors, *control}
    for name in control:
        np.testing.assert_allclose(got.tensors[name], 0.5, rtol=1e-2)


CODED = update.pack(
    uplink.encode({n: v - LEASED[n] for n, v in parts()[0].items()}, "int4"), parts()[1], FACTS
)


@given(st.integers(0, len(CODED) - 1), st.integers(1, 255))
def test_a_flipped_byte_of_a_coded_update_never_raises_anything_else(position, mask):
    data = bytearray(CODED)
    data[position] ^= mask
    try:
        check_coded(bytes(data), replace(LEASE, uplink="int4"))
    except UpdateRejected:
        pass
