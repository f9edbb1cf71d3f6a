"""Coded changes: bytes per parameter on the wire, error bounds, and what hostile bytes are told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol import names, tensors, update, uplink
from protocol.tensors import TensorError
from tests.protocol.test_update import FACTS

RANK, HIDDEN, WIDTH, LAYERS, EXPERTS = 4, 192, 160, 4, 16


def realistic(experts=40, seed=0):
    """Changes as Adam makes them: about rate * steps for factors, a tenth of it for router rows."""
    rng = np.random.default_rng(seed)
    made = {}
    for i in range(experts):
        layer, expert = divmod(i, 10)
        sizes = {"gate_up": (2 * WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        for projection, (out, features) in sizes.items():
            made[names.lora(layer, expert, projection, "lora_A")] = (RANK, features)
            made[names.lora(layer, expert, projection, "lora_B")] = (out, RANK)
        made[names.router_row(layer, expert)] = (HIDDEN,)
    return {
        n: rng.normal(0, 1e-4 if "router" in n else 1e-2, s).astype(np.float32)
        for n, s in made.items()
    }


@pytest.mark.parametrize(("kind", "most", "error"), [("int8", 1.1, 0.01), ("int4", 0.6, 0.13)])
def test_a_whole_update_is_small_and_close(kind, most, error):
    change = realistic()
    stats = {s: np.ones((LAYERS, EXPERTS), np.float32) for s in update.STATS}
    stats |= {f"more{i}": np.ones((LAYERS, EXPERTS), np.float32) for i in range(4)}
    body = update.pack(uplink.encode(change, kind), stats, FACTS)
    parameters = sum(v.size for v in change.values())
    assert parameters == 40 * 3648
    assert len(body) / parameters <= most
    seen = uplink.seen_by_server(change, kind)
    assert list(seen) != []
    for role in {uplink.role(n) for n in change}:
        mine = [n for n in change if uplink.role(n) == role]
        off = np.concatenate([(seen[n] - change[n]).ravel() for n in mine])
        size = np.concatenate([change[n].ravel() for n in mine])
        # Router rows move a hundred times less than factors and lose no more.
        assert np.linalg.norm(off) / np.linalg.norm(size) < error, role


@pytest.mark.parametrize("kind", uplink.KINDS)
def test_coded_bytes_are_what_is_written(kind):
    change = realistic(3) | {"layers.9.router.1": np.ones(7, np.float32)}
    coded = uplink.encode(change, kind)
    shapes = {n: v.shape for n, v in change.items()}
    assert sum(v.nbytes for v in coded.values()) == uplink.coded_bytes(shapes, kind)


def test_the_levels_by_hand():
    # Largest 7 -> scale 1 in int4: whole numbers survive; zero always does.
    change = {"layers.0.router.0": np.array([7, -7, 0, 3, -1, 2.4], np.float32)}
    seen = uplink.seen_by_server(change, "int4")["layers.0.router.0"]
    assert seen.tolist() == [7, -7, 0, 3, -1, 2]


values = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-4, 4, width=32, allow_subnormal=False)
)


@settings(max_examples=60)
@given(st.dictionaries(st.integers(0, 12), values, min_size=1, max_size=5), st.booleans())
def test_errors_are_bounded(parts, rows):
    form = "layers.0.router.{}" if rows else "layers.{}.experts.0.up.lora_A"
    change = {form.format(i): v for i, v in parts.items()}
    flat = np.concatenate([change[n] for n in sorted(change)])
    padded = np.pad(flat, (0, -flat.size % 64)).reshape(-1, 64)
    peak = np.repeat(np.abs(padded).max(-1), 64)[: flat.size]
    for kind, share in (("int8", 0.57 / 127), ("int4", 0.25)):
        seen = uplink.seen_by_server(change, kind)
        assert seen.keys() == change.keys()
        off = np.abs(np.concatenate([seen[n] for n in sorted(change)]) - flat)
        tiny = 127 * uplink.UNIT * 2.0**-25  # half the smallest scale, on every level
        assert (off <= share * peak + tiny).all(), kind
        # The search never does worse than the plain rule, scale = peak / 7, but for the scale's own rounding.
        if kind == "int4":
            scale = (np.maximum(padded.max(-1) / 7, -padded.min(-1) / 8))[:, None]
            plain = np.rint(padded / np.maximum(scale, 1e-12)).clip(-8, 7) * scale
            rounding = np.linalg.norm(peak) * 2.0**-11 + 1e-5
            assert np.linalg.norm(off) <= np.linalg.norm(plain - padded) + rounding


@given(st.permutations(sorted(realistic(2))))
def test_order_does_not_matter(order):
    change = realistic(2)
    shuffled = {n: change[n] for n in order}
    assert tensors.encode(uplink.encode(shuffled, "int4")) == tensors.encode(
        uplink.encode(change, "int4")
    )


@pytest.mark.parametrize("kind", uplink.KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_what_cannot_be_coded_is_said(kind, bad):
    change = {"layers.0.router.0": np.array([1, bad], np.float32)}
    with pytest.raises(TensorError, match=f"cannot be coded in {kind}: change ") as caught:
        uplink.encode(change, kind)
    assert "\n" not in str(caught.value)


SHAPES = {"layers.0.router.0": (70,)}
GOOD = uplink.encode({"layers.0.router.0": np.ones(70, np.float32)}, "int8")


def spoilt(**more):
    return {**GOOD, **{f"change.{k}": v for k, v in more.items()}}


@pytest.mark.parametrize(
    ("coded", "line"),
    [
        ({uplink.CODES: GOOD[uplink.CODES]}, "'change.scales' is missing"),
        (spoilt(more=np.zeros(1, np.uint8)), "'change.more' is extra"),
        (spoilt(codes=np.zeros(127, np.uint8)), r"uint8 \(127,\), uint8 \(128,\) wanted"),
        (spoilt(codes=np.zeros(128, np.int8)), r"int8 \(128,\), uint8"),
        (spoilt(codes=np.zeros((2, 64), np.uint8)), r"uint8 \(2, 64\), uint8 \(128,\) wanted"),
        (spoilt(scales=np.ones(2, np.float32)), r"float32 \(2,\), float16 \(2,\) wanted"),
        (spoilt(scales=np.ones(3, np.float16)), r"float16 \(3,\), float16 \(2,\) wanted"),
        (spoilt(scales=np.array([1, np.nan], np.float16)), "holds NaN"),
        (spoilt(scales=np.array([1, np.inf], np.float16)), "holds NaN, infinity"),
        (spoilt(scales=np.array([1, -1], np.float16)), "negative"),
    ],
)
def test_hostile_codes_get_one_line(coded, line):
    with pytest.raises(TensorError, match=line) as caught:
        uplink.decode(coded, SHAPES, "int8")
    assert "\n" not in str(caught.value)


def test_an_unknown_coding():
    with pytest.raises(TensorError, match="coding 'int2', one of int8, int4 wanted"):
        uplink.decode(GOOD, SHAPES, "int2")


def test_nothing_to_send():
    assert uplink.decode(uplink.encode({}, "int4"), {}, "int4") == {}
