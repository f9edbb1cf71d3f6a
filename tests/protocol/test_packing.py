import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol import packing

formats = st.sampled_from(packing.FORMATS)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda n: n * packing.GROUP))
weights = hnp.arrays(np.float32, sizes, elements=st.floats(-60000, 60000, width=32))
TOP = {"int4": 8, "nf4": 1, "int8": 127}
GAP = {"int4": 1, "nf4": float(np.diff(packing.NF4).max()), "int8": 1}


def slow(packed, scale, format):
    """One value after the other, as the table in `packing` says."""
    rows = []
    for row, scales in zip(packed.tolist(), scale.astype(float).tolist(), strict=True):
        if format == "int8":
            levels = [byte - 128 for byte in row]
        else:
            codes = [code for byte in row for code in (byte >> 4, byte & 15)]
            levels = [packing.NF4[c] if format == "nf4" else c - 8 for c in codes]
        rows.append([scales[i // packing.GROUP] * level for i, level in enumerate(levels)])
    return np.array(rows, np.float32)


@given(st.data(), formats, st.integers(1, 3), st.integers(1, 3))
def test_reading_is_as_the_table_says(data, format, rows, groups):
    width = packing.packed_bytes(format, 1, groups * packing.GROUP)
    packed = data.draw(hnp.arrays(np.uint8, (rows, width)))
    finite = st.floats(-100, 100, width=16)
    scale = data.draw(hnp.arrays(np.float16, (rows, groups), elements=finite))
    got = packing.dequantize(packed, scale, format)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow(packed, scale, format), rtol=1e-6)


@settings(deadline=None)
@given(weights, formats)
def test_there_and_back_is_off_by_half_a_level(weight, format):
    packed, scale = packing.quantize(weight, format)
    assert packed.shape == (len(weight), packing.packed_bytes(format, 1, weight.shape[1]))
    assert scale.shape == (len(weight), weight.shape[1] // packing.GROUP)
    assert np.isfinite(scale).all()
    assert (scale >= 0).all()
    back = packing.dequantize(packed, scale, format)
    step = np.repeat(scale.astype(np.float64), packing.GROUP, axis=1)
    # A scale is right to a part in 2048, and in the range of denormals to 2**-25.
    slack = step * TOP[format] * 2.0**-10 + TOP[format] * 2.0**-24
    bound = step * GAP[format] / 2 + slack
    if format == "int4":
        # The largest of a group may be cut off, where that costs less in sum.
        bound += np.maximum(np.abs(weight) - 7 * step, 0)
    assert (np.abs(back - weight.astype(np.float64)) <= bound).all()


@settings(deadline=None)
@given(weights)
def test_int4_never_loses_more_than_with_the_widest_scale(weight):
    groups = weight.reshape(-1, packing.GROUP)
    packed, scale = packing.quantize(groups, "int4")
    found = ((packing.dequantize(packed, scale, "int4") - groups).astype(np.float64) ** 2).sum(1)
    for row, (group, error) in enumerate(zip(groups.astype(np.float64), found, strict=True)):
        widest = float(np.float16(max(group.max() / 7, -group.min() / 8)))
        if widest < 2.0**-10:
            continue  # so near to the smallest float16 the rounding of scales decides
        levels = np.clip(np.rint(group / widest), -8, 7)
        plain = ((levels * widest - group) ** 2).sum()
        # Both were compared in parts of 1/256 of a level.
        fine = 2 * math.sqrt(plain * packing.GROUP) * widest / packing.FINE
        assert error <= plain * (1 + 1e-5) + fine + packing.GROUP * (widest / packing.FINE) ** 2, (
            row
        )


@given(formats, st.integers(-20, 4))
def test_all_levels_and_zero_are_exact(format, power):
    scale = 2.0**power
    if format == "int8":
        levels = np.arange(-127, 128 + 1)[:256]
        levels = np.concatenate([np.clip(levels, -127, 127)[:255], [0]])
    elif format == "nf4":
        levels = np.concatenate([packing.NF4, packing.NF4[::-1]])
    else:
        levels = np.concatenate([np.arange(-8, 8), np.arange(7, -9, -1)])
    # Each group holds its largest, so that the scale is known.
    largest = {"int4": (-8, 7), "nf4": (-1, 1), "int8": (-127, 127)}[format]
    rows = [
        [*largest, *levels[i : i + packing.GROUP - 2]] + [0] * packing.GROUP
        for i in range(0, len(levels), packing.GROUP - 2)
    ]
    weight = np.array([row[: packing.GROUP] for row in rows], np.float32) * np.float32(scale)
    np.testing.assert_array_equal(
        packing.dequantize(*packing.quantize(weight, format), format), weight
    )
    nothing = np.zeros((1, packing.GROUP), np.float32)
    np.testing.assert_array_equal(
        packing.dequantize(*packing.quantize(nothing, format), format), nothing
    )


def test_the_column_order_of_nibbles():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :3] = 7, -8, 3
    packed, scale = packing.quantize(weight)
    assert scale.tolist() == [[1.0]]
    assert packed[0, :2].tolist() == [(15 << 4) | 0, (11 << 4) | 8]


@pytest.mark.parametrize("columns", [0, 1, 33])
def test_a_width_that_is_no_multiple_of_the_group(columns):
    if columns:
        with pytest.raises(ValueError, match="not a multiple of the group of 32"):
            packing.quantize(np.zeros((1, columns), np.float32))
    assert packing.packs((1, columns)) is (columns % 32 == 0)
