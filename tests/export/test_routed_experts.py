"""One layer's block: who is chosen, what comes out, and the statistics, each counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export import families, local_objective
from export.routed_experts import RoutedExperts
from protocol.manifest import Slot
from tests.export.operands import Layer

CONFIG = {
    "model_type": "olmoe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "hidden_act": "silu",
}
LAYER = Layer(("int8", "int4", "nf4"), (4, 2, 0), hidden=32, width=32)
RESIDENT = [4, 0, 3]


def block():
    base = SimpleNamespace(
        config=CONFIG, projections=("gate_up", "down"), intermediate=32, top_k=2, num_experts=6
    )
    kinds = tuple(Slot(format=f, rank=r) for f, r in zip(LAYER.formats, LAYER.ranks, strict=True))
    return RoutedExperts(torch.nn.Identity(), families.of(CONFIG, "here"), base, kinds)


def given_of(router, delta, valid, tensors, *, statistics=False):
    """What a program hands to the block."""
    names = [f"{p}.{part}" for p in ("gate_up", "down") for part in ("packed", "scale")]
    names += [f"{p}.{part}" for p in ("gate_up", "down") for part in ("a", "b")]
    rows = {"router_rows": router[RESIDENT], "router": delta, "valid": valid}
    rows["output_scale"] = torch.ones(1)
    if statistics:
        whole = router.clone()
        whole[RESIDENT] += delta
        there = torch.zeros(6)
        there[RESIDENT] = 1
        rows |= {"router_all": whole, "resident": there}
    else:
        every = {"objective.cap": 99, "objective.active": 99}
        for name in local_objective.INPUTS:
            key = f"objective.{name}"
            rows[key] = torch.tensor([float(every.get(key, 0))])
        rows["target"] = torch.full((3,), 1 / 3)
    return rows | dict(zip(names, tensors, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.floats(0, 30), st.integers(0, 99))
def test_equals_a_loop_over_tokens_whatever_the_routing(tokens, skew, seed):
    torch.manual_seed(seed)
    router, delta = torch.randn(6, 32), torch.randn(3, 32) * 0.1
    router[RESIDENT[0]] += skew  # towards one expert taking every token
    x, tensors = torch.randn(1, tokens, 32).abs(), LAYER.tensors(seed)
    layer = block()
    layer.given = given_of(router, delta, torch.ones(1, tokens), tensors)
    with torch.no_grad():
        found = layer(x)
        probabilities = torch.softmax(x[0] @ (router[RESIDENT] + delta).T, -1)
        weight, slot = probabilities.topk(2)
        wanted, _ = LAYER.by_token(x[0], weight / weight.sum(-1, keepdim=True), slot, tensors)
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)
    assert layer.seen["routed"].sum() == 2 * tokens  # none is dropped
    counts = torch.bincount(slot.reshape(-1), minlength=3).float()
    torch.testing.assert_close(layer.seen["routed"], counts)


def test_padding_is_not_counted():
    torch.manual_seed(0)
    layer, valid = block(), torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    layer.given = given_of(torch.randn(6, 32), torch.zeros(3, 32), valid, LAYER.tensors())
    with torch.no_grad():
        layer(torch.randn(2, 4, 32))
    assert layer.seen["routed"].sum() == 2 * 4


def test_statistics_by_hand():
    """Logits that are logarithms, so that every probability is known: tokens 0 and 1, and a third that is padding."""
    shares = np.array([[0.1, 0.1, 0.2, 0.1, 0.4, 0.1], [0.3, 0.25, 0.15, 0.2, 0.05, 0.05]])
    router = torch.zeros(6, 32)
    router[:, :2] = torch.from_numpy(np.log(shares)).T.float()
    x = torch.eye(32)[None, :3]
    layer = block()
    tensors = LAYER.tensors()
    valid = torch.tensor([[1.0, 1, 0]])
    layer.given = given_of(router, torch.zeros(3, 32), valid, tensors, statistics=True)
    with torch.no_grad():
        layer(x)
    seen = {name: value.numpy() for name, value in layer.seen.items()}
    np.testing.assert_allclose(seen["mass"], shares.sum(0), rtol=1e-5)
    # The full router's two best: experts 4 and 2, then 0 and 1.
    np.testing.assert_allclose(seen["top"], [0.3, 0.25, 0.2, 0, 0.4, 0], atol=1e-6)
    np.testing.assert_allclose(seen["g_log_g"], (shares * np.log(shares)).sum(0), rtol=1e-5)
    # Three tokens of padding and all: the first of a hundred is the largest.
    np.testing.assert_allclose(seen["peak"], shares.max(0), rtol=1e-5)
    np.testing.assert_allclose(seen["high"], shares.max(0), rtol=1e-5)
    # Residents 4, 0, 3 have 0.4 + 0.1 + 0.1 of the first token, 0.05 + 0.3 + 0.2 of the second.
    assert seen["missed"].item() == pytest.approx(0.4 + 0.45, abs=1e-5)
    # Among the residents: token 0 goes to slots 0 and 1 or 2 (a tie), token 1 to slots 1 and 2 with 0.6 and 0.4.
    second = torch.tensor([[1, 2]])
    with torch.no_grad():
        _, norms = LAYER.by_token(x[0, 1:2], torch.tensor([[0.6, 0.4]]), second, tensors)
        _, first = LAYER.by_token(x[0, :1], torch.tensor([[0.8]]), torch.tensor([[0]]), tensors)
    assert seen["output_norm"][0] == pytest.approx(0.8 * first.item(), rel=1e-4)
    tied = seen["output_norm"][1:] - [0.6 * norms[0, 0].item(), 0.4 * norms[0, 1].item()]
    assert (np.abs(tied) < 1e-5).sum() == 1
