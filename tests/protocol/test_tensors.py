import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol import tensors
from protocol.tensors import TensorError

arrays = st.dictionaries(
    st.text("abc.123", min_size=1, max_size=8),
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.uint8, np.int64]),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
    ),
    max_size=4,
)


@given(arrays)
def test_arrays_survive(named):
    got = tensors.decode(tensors.encode(named))
    assert got.keys() == named.keys()
    for name, array in named.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@given(arrays)
def test_the_order_of_names_does_not_change_the_bytes(named):
    assert tensors.encode(named) == tensors.encode(dict(reversed(named.items())))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    got, line = {}, ""
    try:
        got = tensors.decode(data)
    except TensorError as error:
        line = str(error)
    assert got == {}  # an empty header with blanks is a file of nothing
    assert "\n" not in line


leaves = st.none() | st.integers(-5, 99) | st.sampled_from(["F32", "BF16", "F8_E4M3", "U8", ""])
keys = st.sampled_from(["dtype", "shape", "data_offsets", "a"])
headers = st.recursive(
    leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3), max_leaves=10
)


@given(headers, st.binary(max_size=40))
def test_any_header_is_read_or_refused(header, body):
    text = json.dumps(header).encode()
    try:
        tensors.decode(len(text).to_bytes(8, "little") + text + body)
    except TensorError:
        pass


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "BOOL", "F4", "C64", "I3"])
def test_every_type_that_a_header_can_name(dtype):
    text = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}}).encode()
    try:
        tensors.decode(len(text).to_bytes(8, "little") + text + bytes(4))
    except TensorError:
        pass


def test_limits():
    data = tensors.encode({"a": np.zeros(100, np.float32)})
    with pytest.raises(TensorError, match=f"{len(data)} bytes of tensors, at most 99 wanted"):
        tensors.decode(data, 99)
    with pytest.raises(TensorError, match="too few"):
        tensors.decode(b"1234567")
    with pytest.raises(TensorError, match="safetensors header of 1152921504606846976 bytes"):
        tensors.decode((1 << 60).to_bytes(8, "little") + b"{}")


def test_a_flipped_byte_never_raises_anything_else():
    data = bytearray(tensors.encode({"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.uint8)}))
    for position in range(len(data)):
        for mask in (1, 0x20, 0xFF):
            broken = bytearray(data)
            broken[position] ^= mask
            try:
                tensors.decode(bytes(broken))
            except TensorError:
                pass


@given(arrays)
def test_mapped_arrays_are_those_of_the_file(tmp_path_factory, named):
    path = tmp_path_factory.getbasetemp() / "mapped"
    path.write_bytes(tensors.encode(named))
    found = tensors.mapped(path)
    assert found.keys() == named.keys()
    for name, array in named.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable


def test_mapped_arrays_outlive_the_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(tensors.encode({"x": np.arange(4, dtype=np.float32)}))
    found = tensors.mapped(path)
    path.unlink()
    assert found["x"].tolist() == [0, 1, 2, 3]


def with_header(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "not a safetensors file"),
        (b"1234567", "not a safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (tensors.encode({"x": np.zeros(4, np.float32)})[:-1], "not a safetensors file"),
        (tensors.encode({"x": np.zeros(4, np.float32)}) + b"0", "not a safetensors file"),
        (
            with_header({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
            "BF16",
        ),
        (
            with_header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, bytes(4)),
            "not a safetensors file",
        ),
    ],
)
def test_what_cannot_be_mapped_is_one_line(tmp_path, content, words):
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TensorError, match=words) as refused:
        tensors.mapped(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@given(st.binary(max_size=200))
def test_any_file_is_mapped_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    try:
        assert tensors.mapped(path) == {}
    except TensorError:
        pass
