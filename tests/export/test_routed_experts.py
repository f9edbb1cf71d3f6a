import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.routed_experts import RoutedExperts, blocks_needed
from protocol import int4, lora

D, F = 32, 32


def packed(rng, slots, out, into):
    weights = [rng.normal(size=(out, into)) * 0.2 for _ in range(slots)]
    both = [int4.quantize(w, 32) for w in weights]
    dense = np.stack([int4.dequantize(q, s) for q, s in both])
    return (
        torch.from_numpy(np.concatenate([q for q, _ in both])),
        torch.from_numpy(np.concatenate([s for _, s in both]).astype(np.float32)),
        torch.from_numpy(dense),
    )


def reference(x, layer, router, gate_up, down):
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    probs = torch.softmax(x @ (router + layer.router).T, -1)
    for t in range(x.shape[0]):
        weight, slot = torch.topk(probs[t], layer.top_k)
        weight = weight / weight.sum()
        for w, s in zip(weight, slot, strict=True):

            def lin(v, dense, p, s=s):
                return dense[s] @ v + lora.SCALE * (p.b[s].T @ (p.a[s].T @ v))

            gate, up = lin(x[t], gate_up, layer.gate_up).chunk(2)
            out[t] += w * lin(torch.nn.functional.silu(gate) * up, down, layer.down)
    return out


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(1, 20),
    st.sampled_from([1, 4, 8]),
    st.floats(0, 30),
    st.integers(0, 99),
)
def test_equals_a_loop_over_tokens_whatever_the_routing(slots, tokens, rows, skew, seed):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    layer = RoutedExperts(slots, D, F, 4, 2, True, rows)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    gp, gs, gate_up = packed(rng, slots, 2 * F, D)
    dp, ds, down = packed(rng, slots, D, F)
    router = torch.randn(slots, D)
    router[0] += skew  # towards one expert taking everything
    x = torch.randn(1, tokens, D).abs()
    layer.wires.given = {
        "valid": torch.ones(1, tokens),
        "router_rows": router,
        "gate_up.packed": gp,
        "gate_up.scale": gs,
        "down.packed": dp,
        "down.scale": ds,
    }
    out = layer(x)
    torch.testing.assert_close(
        out[0], reference(x[0], layer, router, gate_up, down), atol=1e-4, rtol=1e-4
    )
    assert layer.wires.seen["routed"].sum() == 2 * tokens  # no token is dropped


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 64))
def test_blocks_needed_suffice_for_any_split(counts, rows):
    used = sum(-(-c // rows) for c in counts)
    assert used <= blocks_needed(sum(counts), len(counts), rows)
