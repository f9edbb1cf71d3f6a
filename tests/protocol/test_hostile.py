"""Files of a store as an attacker or a bad disk would have them: read, or refused in one line."""

import copy
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import slots
from edge.slots import SlotError
from protocol import manifest, packing, tensors
from protocol.manifest import ManifestError, check_fits, parse_base, parse_manifest
from protocol.tensors import TensorError
from server.artifacts import Artifacts
from tests.server import tiny_store
from tests.server.tiny_store import FULL, HALF, WIDE

PROFILES = {"small": ((FULL, HALF), (WIDE, FULL))}
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**30])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["int4", "nf4", "none", "float32", "a\nb", "0" * 64]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "store"
    tiny_store.build(folder, PROFILES)
    return folder


@pytest.fixture(scope="module")
def good(store):
    """base and manifest as parsed JSON."""
    found = [json.loads((store / n).read_bytes()) for n in ("base.json", "small/manifest.json")]
    found[1]["train"]["inputs"] = [{"name": "x", "shape": [2, 3], "dtype": "float32"}]
    return found


def places(value, path=()):
    """Every place in parsed JSON."""
    yield path
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def mutate(data, value, rng):
    """Put `value` somewhere, or take something away, or put it beside, or twice."""
    data = copy.deepcopy(data)
    path = rng.choice(list(places(data)))
    if not path:
        return value
    where = data
    for key in path[:-1]:
        where = where[key]
    kind = rng.randrange(4)
    if kind == 0:
        where[path[-1]] = value
    elif kind == 1:
        del where[path[-1]]
    elif isinstance(where, list):
        where.insert(path[-1], copy.deepcopy(where[path[-1]]) if kind == 2 else value)
    else:
        where[str(value)[:50]] = value
    return data


def line_of(refusal, call, *arguments):
    """What it says when it refuses; nothing when it does not."""
    try:
        call(*arguments)
    except refusal as error:
        return str(error)
    return ""


def use(base, found):
    """What a device does with the two before anything is downloaded."""
    check_fits(found, base, "store")
    resident = {
        layer: tuple(range(len(kinds)))
        for layer, kinds in zip(base.moe_layers, found.shape.slots, strict=True)
    }
    slots.adapter_shapes(base, found.shape, resident)
    for blob in slots.blobs_of(base, found.shape, resident):
        assert len(blob.sha256) == 64
    with pytest.raises(SlotError):  # a blob of nothing; its room is reserved before it is read
        slots.expert_inputs(base, found.shape, resident, lambda blob: {})
    for spec in found.train.inputs:
        assert math.prod(spec.shape) * np.dtype(spec.dtype).itemsize < 1 << 50
    assert isinstance(found.memory.predicted, int)
    manifest.to_json(found)
    manifest.to_json(base)


@settings(deadline=None, max_examples=400)
@given(st.randoms(use_true_random=False), st.lists(anything, min_size=1, max_size=3), st.booleans())
def test_mutated_indices_are_read_or_refused(good, rng, values, of_base):
    data = list(good)
    for value in values:
        data[1 - of_base] = mutate(data[1 - of_base], value, rng)

    def read():
        use(parse_base(data[0], "base"), parse_manifest(data[1], "manifest"))

    line = line_of((ManifestError, SlotError), read)
    assert "\n" not in line
    assert len(line) < 1100


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_mutated_bytes_are_read_or_refused(store, rng):
    for name, read in (
        ("base.json", manifest.read_base),
        ("small/manifest.json", manifest.read_manifest),
    ):
        data = bytearray((store / name).read_bytes())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        cut = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data
        path = store / "mutated.json"
        path.write_bytes(cut)
        assert "\n" not in line_of(ManifestError, read, path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b"1" * 5000,
        b'{"protocol": 1' + b"0" * 4000 + b"}",
        b'{"protocol": NaN}',
        b'{"protocol": 2, "' + b"x" * 1_000_000 + b'": 1}',
    ],
)
def test_no_index_at_all(tmp_path, content):
    path = tmp_path / "base.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as error:
        manifest.read_base(path)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1100


def test_an_index_larger_than_any_is_not_read(tmp_path):
    path = tmp_path / "base.json"
    with open(path, "wb") as file:
        file.truncate(manifest.MAX_MANIFEST + 1)
    with pytest.raises(ManifestError, match="at most"):
        manifest.read_base(path)


def test_another_protocol_is_said_first(good):
    with pytest.raises(ManifestError, match="protocol 1 found, 3 wanted"):
        parse_base({"protocol": 1, "something": "else"}, "base")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": 0}, "group 0 is out of range"),
        ({"num_experts": 0}, "num_experts 0 is out of range"),
        ({"hidden": 1 << 40}, "hidden .* is out of range"),
        ({"top_k": 99}, "cannot be used at once"),
        ({"moe_layers": [1, 0]}, "not in order"),
        ({"moe_layers": []}, "not in order"),
        ({"routing_prior": []}, "routing_prior does not cover"),
    ],
)
def test_counts_that_cannot_be(good, change, words):
    with pytest.raises(ManifestError, match=words):
        parse_base({**good[0], **change}, "base")


@pytest.fixture(scope="module")
def blob():
    rng = np.random.default_rng(0)
    named = {}
    for name in ("gate_up", "down"):
        weight = rng.normal(size=(4, 32)).astype(np.float32)
        named[f"{name}.packed"], named[f"{name}.scale"] = packing.quantize(weight, "int4")
    return tensors.encode(named)


def read_or_refuse(data):
    def read():
        for value in tensors.decode(data).values():
            assert isinstance(value, np.ndarray)
            assert value.nbytes <= len(data)

    line = line_of(TensorError, read)
    assert "\n" not in line
    assert len(line) < 1100


@settings(deadline=None)
@given(st.data())
def test_blobs_with_flipped_bits(blob, data):
    broken = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1) | st.integers(0, 300))
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    read_or_refuse(bytes(broken))


@given(st.integers(0, 2000), st.binary(max_size=20))
def test_blobs_cut_off_or_continued(blob, keep, more):
    if keep < len(blob):
        with pytest.raises(TensorError):
            tensors.decode(blob[:keep])
    if more:
        with pytest.raises(TensorError):
            tensors.decode(blob + more)


@pytest.mark.parametrize("size", [1 << 22, (1 << 22) + 1, 1 << 40, (1 << 64) - 1])
def test_headers_larger_than_the_file(blob, size):
    with pytest.raises(TensorError, match="header of"):
        tensors.decode(size.to_bytes(8, "little") + blob[8:])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}
        for dtype, size in (
            *(("F64", 8), ("I64", 8), ("U64", 8), ("C64", 8), ("I32", 4), ("BF16", 2)),
            *(("I8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("Q9", 1)),
        )
    ]
    + [
        {"dtype": "U8", "shape": [1 << 62, 4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [0, 1 << 63], "data_offsets": [0, 0]},
        {"dtype": "U8", "shape": [1] * 100, "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]},
        {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_entries_of_all_kinds(entry):
    header = json.dumps({"a": entry}).encode()
    ends = entry["data_offsets"] if isinstance(entry, dict) else [0]
    read_or_refuse(len(header).to_bytes(8, "little") + header + bytes(max(ends)))


@given(st.randoms(use_true_random=False))
def test_expert_blobs_of_the_wrong_kind_do_not_fill_a_slot(store, rng):
    """Whatever `decode` lets through is checked once more against the slot it is for."""
    base = manifest.read_base(store / "base.json")
    found = manifest.read_manifest(store / "small/manifest.json")
    resident = {layer: (0, 1) for layer in base.moe_layers}

    def read(blob):
        value = lambda: rng.choice(  # noqa: E731
            [
                np.zeros((), np.float16),
                np.zeros((rng.randrange(3), rng.randrange(3)), np.uint8),
                np.zeros((2 * base.intermediate, base.hidden), np.float64),
                np.zeros(0, np.uint8),
            ]
        )
        return {k: value() for k in ("gate_up.packed", "gate_up.scale", "down.packed", "x")}

    with pytest.raises(SlotError, match="expert blob"):
        slots.expert_inputs(base, found.shape, resident, read)


def test_a_broken_dense_blob_stops_the_server_with_one_line(tmp_path):
    base = tiny_store.build(tmp_path / "store", PROFILES)
    artifacts = Artifacts(tmp_path / "store")
    path = artifacts.blob_path(base.dense[min(base.dense)].sha256)
    whole, rng = path.read_bytes(), random.Random(0)
    artifacts.routers()
    for header in (b"[]", b"null", b'{"a": 1}', b'{"a": {"data_offsets": 1}}', b"[" * 9000):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert "no readable dense blob" in line_of(ManifestError, artifacts.routers)
    for trial in range(300):
        broken = bytearray(whole)
        for _ in range(3):
            broken[rng.randrange(min(len(broken), 400))] = rng.randrange(256)
        path.write_bytes(broken[: rng.randrange(len(broken))] if trial % 3 == 0 else broken)
        assert "\n" not in line_of(ManifestError, artifacts.routers)
