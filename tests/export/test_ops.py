"""The operators' eager reference and its gradients against plain torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from export import ops
from protocol import packing
from tests.export.operands import ACTIVATIONS, Layer, routing

OPS = torch.ops.expertfleet
MIXED = ("int4", "int8", "nf4", "int4")


def weight(format, out, features, seed=0):
    """(packed, scale) flat, and the matrix that they hold."""
    values = np.random.default_rng(seed).normal(size=(out, features))
    packed, scale = packing.quantize(values, format)
    matrix = torch.from_numpy(packing.dequantize(packed, scale, format))
    return torch.from_numpy(packed).view(-1), torch.from_numpy(scale).view(-1), matrix


@pytest.mark.parametrize("format", packing.FORMATS)
def test_packed_products_are_those_of_the_matrix(format):
    packed, scale, matrix = weight(format, 10, 64)
    torch.testing.assert_close(
        ops.dequantize(packed, scale, packing.FORMATS.index(format), 10, 64), matrix
    )
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = ops.packed_linear(x, packed, scale, format, 10)
    torch.testing.assert_close(y, x @ matrix.T)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ matrix)
    ids = torch.tensor([[3, 9], [0, 3]])
    torch.testing.assert_close(ops.packed_embedding(ids, packed, scale, format, 64), matrix[ids])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(packing.FORMATS), st.sampled_from([0, 1, 4, 8])),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 12),
    st.sampled_from(ops.ACTIVATIONS),
    st.booleans(),
    st.integers(0, 99),
)
def test_routed_experts_equal_a_loop_over_tokens(slots, tokens, activation, gated, seed):
    formats, ranks = zip(*slots, strict=True)
    layer = Layer(formats, ranks, activation, gated, hidden=32, width=64)
    tensors = layer.tensors(seed)
    weights, slot = routing(tokens, min(2, len(slots)), len(slots), seed)
    torch.manual_seed(seed)
    x = torch.randn(tokens, 32)
    wanted = [t.requires_grad_(True) for t in (x, weights, *tensors[4:])]
    y, norms = layer.by_token(x, weights, slot, tensors)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, wanted, dy, materialize_grads=True)
    found, _ = OPS.routed_experts(x, weights, slot, *tensors, *layer.rest())
    torch.testing.assert_close(found, y, atol=1e-4, rtol=1e-4)
    for got, want in zip(torch.autograd.grad(found, wanted, dy), gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        both = OPS.routed_experts_norms(x, weights, slot, *tensors, *layer.rest())
    torch.testing.assert_close(both[0], y.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1], norms.detach(), atol=1e-4, rtol=1e-4)


def test_activations_are_numbered_as_the_native_ones():
    from pathlib import Path

    header = (Path(ops.__file__).parents[1] / "edge" / "native" / "activation.h").read_text()
    numbers = ", ".join(f"{name.upper()} = {i}" for i, name in enumerate(ops.ACTIVATIONS))
    assert f"enum Activation : int64_t {{ {numbers} }}" in header
    assert set(ops.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "width", "value", "window"),
    [(4, 2, 9, 8, 8, 0), (4, 4, 9, 8, 16, 0), (4, 1, 20, 16, 8, 5), (2, 2, 1, 8, 8, 0)],
)
def test_attention_is_scaled_dot_product_attention(heads, groups, tokens, width, value, window):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, h, tokens, w, requires_grad=True)
        for h, w in ((heads, width), (groups, width), (groups, value))
    )
    y, lse = OPS.causal_attention(q, k, v, 0.3, window)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window:
        seen = seen & seen.new_ones(tokens, tokens).triu(1 - window)
    wanted = F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    wanted = wanted.transpose(1, 2)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (q, k, v), dy)
    for got, want in zip(found, torch.autograd.grad(wanted, (q, k, v), dy), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    first = (q[0, 0, 0] @ k[0, 0, 0]) * 0.3  # the first token sees itself only
    torch.testing.assert_close(lse[0, 0, 0], first)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "a mask of its own"),
    ],
)
def test_attention_of_another_kind_is_refused(options, words):
    q = torch.zeros(1, 4, 4, 8)
    with pytest.raises(NotImplementedError, match=words):
        ops.causal_attention(torch.nn.Identity(), q, q, q, **{"attention_mask": None, **options})


def calls():
    """One call of every operator."""
    layer = Layer(MIXED, (4, 0, 2, 1))
    tensors, (weights, slot) = layer.tensors(), routing(5, 2, 4)
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    packed, scale, _ = weight("int8", 10, 64)
    y, saved = OPS.routed_experts(x, weights, slot, *tensors, *layer.rest())
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    out, lse = OPS.causal_attention(q, k, k, 0.5, 3)
    return {
        "packed_linear": (x, packed, scale, 2, 10),
        "packed_linear_backward": (torch.randn(5, 10), packed, scale, 2, 64),
        "packed_embedding": (torch.tensor([[1, 2]]), packed, scale, 2, 64),
        "routed_experts": (x, weights, slot, *tensors, *layer.rest()),
        "routed_experts_norms": (x, weights, slot, *tensors, *layer.rest()),
        "routed_experts_backward": (dy, x, weights, slot, saved, *tensors, *layer.rest()),
        "causal_attention": (q, k, k, 0.5, 3),
        "causal_attention_backward": (torch.randn_like(out), q, k, k, out, lse, 0.5, 3),
    }


@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_tracing_believes_what_the_operators_do(name):
    """Shapes, strides and types; and that nothing is changed in place or handed through."""
    operator, arguments = getattr(OPS, name).default, calls()[name]
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    before = [a.clone() if torch.is_tensor(a) else a for a in arguments]
    real = operator(*arguments)
    fake, real = (r if isinstance(r, tuple) else (r,) for r in (fake, real))
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    for old, argument in zip(before, arguments, strict=True):
        if torch.is_tensor(argument):
            assert torch.equal(old, argument)
            assert all(argument.data_ptr() != r.data_ptr() for r in real if r.numel())
