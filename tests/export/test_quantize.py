import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export import quantize as fast
from protocol import packing

# Up to what a float16 scale can hold; zeros, halves of levels and denormals come by themselves.
weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=3).map(
        lambda s: (s[0], 32 * s[1])
    ),
    elements=st.floats(-60000, 60000, width=32),
)


@pytest.mark.parametrize("format", packing.FORMATS)
@settings(deadline=None)
@given(weight=weights, power=st.integers(-40, 0))
def test_the_bytes_are_those_of_the_definition(format, weight, power):
    weight = (weight * np.float32(2.0) ** power).astype(np.float32)
    packed, scale = packing.quantize(weight, format)
    found, total = fast.quantize(torch.from_numpy(weight), (format,))
    np.testing.assert_array_equal(found[format].packed, packed)
    np.testing.assert_array_equal(found[format].scale, scale)
    difference = packing.dequantize(packed, scale, format).astype(np.float64) - weight
    assert found[format].squared_error == pytest.approx((difference**2).sum(), rel=1e-3, abs=1e-30)
    assert total == pytest.approx((weight.astype(np.float64) ** 2).sum(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_and_types_make_no_difference(dtype, monkeypatch):
    weight = (torch.randn(37, 96, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    whole, _ = fast.quantize(weight, packing.FORMATS)
    monkeypatch.setattr(fast, "BLOCK", 5 * 96 + 1)
    pieces, _ = fast.quantize(weight, packing.FORMATS)
    monkeypatch.setattr(fast, "BLOCK", 7)  # fewer than a row
    rows, _ = fast.quantize(weight, packing.FORMATS)
    for format in packing.FORMATS:
        packed, scale = packing.quantize(weight.float().numpy(), format)
        for found in (whole, pieces, rows):
            np.testing.assert_array_equal(found[format].packed, packed)
            np.testing.assert_array_equal(found[format].scale, scale)


@pytest.mark.parametrize("format", packing.FORMATS)
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.full((1, 32), torch.nan), "NaN or infinity"),
        (torch.full((1, 32), -torch.inf), "NaN or infinity"),
        (torch.full((1, 32), 1e8), "too large for a float16 scale"),
        (torch.zeros(1, 33), "33 input features are not a multiple"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_both(format, weight, words):
    with pytest.raises(ValueError, match=words):
        fast.quantize(weight, (format,))
    with pytest.raises(ValueError, match=words):
        packing.quantize(weight.numpy(), format)


@pytest.mark.parametrize("format", packing.FORMATS)
def test_values_on_and_beside_the_border_of_two_codes(format):
    levels = packing.NF4 if format == "nf4" else np.arange(-8, 8, dtype=np.float32)
    borders = (levels[1:] + levels[:-1]) / 2
    largest = np.float32({"nf4": 1, "int4": 7, "int8": 127}[format])
    near = [np.nextafter(borders, to, dtype=np.float32) for to in (-np.inf, np.inf)]
    values = np.concatenate([borders, *near])
    # The first of each group makes its scale 1.
    groups = [[largest, *values[i : i + 31]] for i in range(0, len(values), 31)]
    weight = np.array([row + [0] * (32 - len(row)) for row in groups], np.float32)
    packed, scale = packing.quantize(weight, format)
    if format != "int4":
        assert (scale == 1).all()
    found, _ = fast.quantize(torch.from_numpy(weight), (format,))
    np.testing.assert_array_equal(found[format].packed, packed)
    np.testing.assert_array_equal(found[format].scale, scale)
